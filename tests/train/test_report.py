"""The report of a run: files of the first process alone, TensorBoard, and the last word."""

import json

import pytest
from reports import LAST_WORD, SUMMARY, row, run, steps_of

from deepseek_jax.train import report
from deepseek_jax.train.report import Report


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


def test_tensorboard_reads_the_scalars_and_forgets_the_interrupted_ones(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, range(1, 6), screen=False).close()
    run(tmp_path, range(4, 8), first=3, screen=False).close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("loss")] == list(range(1, 8))
    assert events.Scalars("loss")[1].value == pytest.approx(4.0)
    assert "expert_load" not in events.Tags()["scalars"]


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
    assert report.last_word(SUMMARY | {"ema_bits_per_byte": 2.2}).endswith("averaged weights: 2.20")


def test_a_run_without_held_out_text_or_steps_ends_too(tmp_path, capsys):
    done = run(tmp_path, [])
    done.finish({})
    done.close()
    assert "no score on held-out text" in capsys.readouterr().out
