"""The report of a run: files of the first process alone, full disks, and the last word."""

import errno
import json
import os

import pytest
from disks import full
from reports import LAST_WORD, SUMMARY, row, run, steps_of

from deepseek_jax.data import files
from deepseek_jax.errors import RunError
from deepseek_jax.train import plots, screens
from deepseek_jax.train.report import Report, last_word


def test_nothing_is_written_before_the_run_begins(tmp_path, capsys):
    waiting = Report(tmp_path / "not yet there", total_tokens=10)
    waiting.say("reading")
    waiting.close()
    assert capsys.readouterr().out == "reading\n"
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_prints_and_writes(tmp_path, capsys):
    other = run(tmp_path, [1, 2], primary=False)
    other.say("hello")
    other.finish(SUMMARY)
    other.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("room", [0, 100])
def test_a_full_disk_costs_a_warning_for_each_file_and_no_row(tmp_path, caplog, room):
    going = run(tmp_path, [1, 2], screen=False)
    with full(str(tmp_path), room):
        for step in range(3, 40):  # more than any queue takes
            going.step(row(step))
    assert [message.split(str(tmp_path))[1] for message in caplog.messages] == [
        "/metrics.jsonl cannot be written (No space left on device); its rows wait in memory until "
        "it can",
        "/tensorboard cannot be written (No space left on device); its events are dropped until it "
        "can",
    ]
    assert steps_of(tmp_path) == [1, 2]
    going.step(row(40))
    assert steps_of(tmp_path) == list(range(1, 41))
    with full(str(tmp_path)):
        going.step(row(41))
    assert len(caplog.messages) == 4  # it is told again
    going.close()
    assert steps_of(tmp_path) == list(range(1, 42))


def test_rows_that_find_no_room_are_told_at_the_end(tmp_path, caplog):
    going = run(tmp_path, [1], screen=False)
    with full("metrics.jsonl"):
        for step in (2, 3):
            going.step(row(step))
        words = r"metrics\.jsonl lacks 2 rows of steps 2 to 3 \(No space left on device\)"
        for end in (lambda: going.finish(SUMMARY), going.settle):
            with pytest.raises(RunError, match=words):
                end()
        going.close()
    assert "lacks 2 rows" in caplog.messages[-1]
    assert (tmp_path / "summary.json").exists() and (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("broken", ["pictures", "summary"])
def test_an_end_that_cannot_be_written_whole(tmp_path, caplog, monkeypatch, broken):
    def fails(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    replace = files.replace
    done = run(tmp_path, [1], screen=False)
    with monkeypatch.context() as patch:
        if broken == "pictures":
            patch.setattr(plots, "draw", fails)
            done.finish(SUMMARY)
        else:
            of = {"summary.json": fails}
            patch.setattr(files, "replace", lambda path, new: of.get(path.name, replace)(path, new))
            with pytest.raises(RunError, match=r"summary\.json cannot be written \(Disk quota exc"):
                done.finish(SUMMARY)
    [said] = caplog.messages
    assert said.endswith("cannot be written (Disk quota exceeded)")
    assert (tmp_path / "summary.json").exists() == (broken == "pictures")
    assert (tmp_path / "loss.png").exists() == (broken == "summary")
    done.close()


def test_a_screen_on_a_full_disk_costs_a_warning(tmp_path, caplog, monkeypatch):
    going = run(tmp_path, [])

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(screens, "print", fails, raising=False)
    for step in (1, 2):
        going.say("a line")
        going.step(row(step))
    going.close()
    [said] = caplog.messages
    assert said.startswith("standard output cannot be written (No space left on device); lines are")
    assert steps_of(tmp_path) == [1, 2]


def test_news_comes_in_order(capsys, tmp_path):
    going = run(tmp_path, [])
    going.say("before")
    going.step(row(1))
    going.step(row(2))
    going.say("after")
    going.close()
    starts = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert starts == ["before", "step 1", "step 2", "after"]


def test_the_last_word(tmp_path, capsys):
    done = run(tmp_path, [1, 2, 3])
    done.finish(SUMMARY)
    done.close()
    *_, result, files = capsys.readouterr().out.splitlines()
    assert result == LAST_WORD
    for name in ("metrics.jsonl", "loss.png", "expert_load.png", "summary.json", "tensorboard/"):
        assert name in files and (tmp_path / name).exists()
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY
    assert steps_of(tmp_path) == [1, 2, 3]


def test_the_last_word_has_the_average_s_score_too():
    assert last_word(SUMMARY | {"ema_bits_per_byte": 2.2}).endswith("averaged weights: 2.20")


def test_the_last_word_sets_the_loss_of_training_text_beside_that_of_held_out_text():
    trained = {
        "held_out_loss": 3.5, "trained_loss": 3.26, "trained_bits_per_byte": 1.4,
        "trained_gzip_bits_per_byte": 2.0,
    }  # fmt: skip
    first, second = last_word(SUMMARY | trained).splitlines()
    assert first == LAST_WORD
    assert second == (
        "nats per token: held-out 3.50, training text 3.26; training text has 1.40 bits per byte "
        "(gzip -9: 2.00)"
    )


def test_a_loss_that_is_not_finite_is_told(tmp_path):
    bad = {"held_out_loss": float("inf"), "held_out_bits_per_byte": float("nan")}
    done = run(tmp_path, [1], screen=False)
    done.finish(SUMMARY | bad)
    done.close()
    kept = json.loads((tmp_path / "summary.json").read_text())
    assert kept == SUMMARY | dict.fromkeys(bad)
    assert last_word(kept) == "finished; the loss on held-out text is not finite"


def test_a_run_without_held_out_text_or_steps_ends_too(tmp_path, capsys):
    done = run(tmp_path, [])
    done.finish({})
    done.close()
    assert "no score on held-out text" in capsys.readouterr().out
