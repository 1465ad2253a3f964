"""Whole runs with bad batches: each rule does what it says, to the bit, also after a resume."""

import json
import shutil

import numpy as np
import pytest
import runs
from poisoned import poison

from deepseek_jax.data.loader import TrainData
from deepseek_jax.train import anomalies, loop

ROWS = 8  # sequences of a step


def after(*steps):
    """Sequences of the data that are consumed after these steps of a run without anomalies."""
    return {ROWS * step for step in steps}


def tiny(text, rule, steps=20, **anomaly):
    """Limits of a window of eight steps, in a run of so many steps."""
    return runs.tiny(
        text,
        model={"layers": 1, "dense_layers": 1},  # quick to compile
        optimizer={"ema_decay": 0.0},
        batch={"sequences": ROWS, "ramp_sequences": ROWS, "micro_sequences": ROWS},
        schedule={"tokens": steps * ROWS * 32},
        evaluation={"tokens": 0},
        anomaly={"rule": rule, "window": 8, "most": 4, "grad_norm_score": 0.0, **anomaly},
    )


def go(config, workdir):
    return loop.train(config, workdir, screen=False)


def logged(workdir):
    """Rows of `anomalies.jsonl` without the losses."""
    keys = ("step", "sequences", "kind", "action")
    return [
        tuple(row[key] for key in keys)
        for row in anomalies.read_anomalies(workdir / "anomalies.jsonl")
    ]


def begun_again(workdir, at, target):
    """A copy of a run whose checkpoints after `at` are lost, as after a kill."""
    run = shutil.copytree(workdir, target)
    for step in runs.checkpoints(run):
        if step > at:
            shutil.rmtree(run / "checkpoints" / str(step))
    return run


def values(workdir):
    """Every row but its times."""
    keys = ("step", "tokens", "loss", "grad_norm", "learning_rate", "skipped_steps", "rewinds")
    return [[row[key] for key in keys] for row in runs.rows(workdir)]


def test_stop_names_step_data_and_checkpoint_and_draws_the_run(
    text, tmp_path, monkeypatch, one_device
):
    poison(monkeypatch, nan=after(6))
    words = (
        r"^step 6 has loss [\d.]+, gradient norm nan, on sequences 40 to 47 of the training data; "
        r"the last good checkpoint is step 4\. Lower .* anomaly\.rule=skip or anomaly\.rule=rewind"
    )
    with pytest.raises(loop.NotFinite, match=words):
        go(tiny(text, "stop"), tmp_path / "run")
    assert runs.checkpoints(tmp_path / "run") == [4]
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert logged(tmp_path / "run") == [(6, [40, 47], "not finite", "stopped")]
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000


@pytest.mark.slow
def test_skipped_steps_change_nothing_and_resume_to_the_bit(
    text, tmp_path, monkeypatch, one_device
):
    poison(monkeypatch, nan=after(3, 6), noise=after(16))
    config = tiny(text, "skip", loss_score=3.0)
    summary = go(config, tmp_path / "run")
    found = logged(tmp_path / "run")
    assert [(step, kind, action) for step, _, kind, action in found] == [
        (3, "not finite", "skipped"),
        (6, "not finite", "skipped"),
        (16, "loss spike", "skipped"),
    ]
    assert summary["skipped_steps"] == 3 and summary["rewinds"] == 0
    rows = {row["step"]: row for row in runs.rows(tmp_path / "run")}
    assert rows[3]["anomaly"] == "not finite" and rows[3]["grad_norm"] is None
    assert rows[16]["anomaly"] == "loss spike" and "anomaly" not in rows[17]
    assert [rows[n]["skipped_steps"] for n in (2, 3, 5, 6, 15, 16, 20)] == [0, 1, 1, 2, 2, 3, 3]
    again = begun_again(tmp_path / "run", 12, tmp_path / "again")
    go(config, again)
    assert values(again) == values(tmp_path / "run")
    assert runs.bits(again) == runs.bits(tmp_path / "run")
    assert logged(again) == found


def test_a_rewind_leaves_out_the_batches_since_the_checkpoint(
    text, tmp_path, monkeypatch, one_device
):
    with monkeypatch.context() as patch:
        poison(patch, nan=after(7))
        config = tiny(text, "rewind", steps=10)
        summary = go(config, tmp_path / "run")
    assert summary["rewinds"] == 1 and summary["step"] == 10
    [found] = logged(tmp_path / "run")
    assert found == (7, [48, 55], "not finite", "rewound to step 4")
    steps = [row["step"] for row in runs.rows(tmp_path / "run")]
    assert steps == list(range(1, 11))  # those of the steps that were undone are gone
    assert [row["rewinds"] for row in runs.rows(tmp_path / "run")] == [0] * 4 + [1] * 6

    # The same as a run whose data lacks what the first four steps have left of the bad batch.
    take, skipped = loop.batches.take, []

    def past(data: TrainData, *rest):
        if data.state()["consumed"] == 4 * ROWS and not skipped:
            skipped.append(4)
            data.restore({**data.state(), "consumed": 7 * ROWS})
        return take(data, *rest)

    monkeypatch.setattr(loop.batches, "take", past)
    go(config, tmp_path / "other")
    assert skipped
    np.testing.assert_array_equal(runs.losses(tmp_path / "run"), runs.losses(tmp_path / "other"))
    assert runs.bits(tmp_path / "run") == runs.bits(tmp_path / "other")


@pytest.mark.slow
def test_weights_that_lead_to_an_anomaly_again_are_given_up(
    text, tmp_path, monkeypatch, one_device
):
    """Two batches after step 8 are bad: the run goes back to step 8, and then to step 4."""
    poison(monkeypatch, nan=after(10, 11))
    config = tiny(text, "rewind")
    summary = go(config, tmp_path / "run")
    assert [action for *_, action in logged(tmp_path / "run")] == [
        "rewound to step 8",
        "rewound to step 4",
    ]
    assert summary["rewinds"] == 2 and summary["step"] == 20
    assert (tmp_path / "run" / "checkpoints" / "8.broken").is_dir()
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == list(range(1, 21))
    again = begun_again(tmp_path / "run", 8, tmp_path / "again")  # the second checkpoint 8
    go(config, again)
    assert values(again) == values(tmp_path / "run")
    assert runs.bits(again) == runs.bits(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["skip", "rewind"])
def test_anomalies_without_end_stop_the_run(text, tmp_path, monkeypatch, one_device, rule):
    poison(monkeypatch, nan=after(*range(5, 1000)))
    words = r"It is anomaly 4 in a row \(anomaly\.most=4\)\. Lower .* or raise anomaly\.most"
    with pytest.raises(loop.NotFinite, match=words):
        go(tiny(text, rule), tmp_path / "run")
    assert [action.split()[0] for *_, action in logged(tmp_path / "run")] == [
        *(["skipped" if rule == "skip" else "rewound"] * 3),
        "stopped",
    ]
    summary = tmp_path / "run" / "summary.json"
    assert not summary.exists() or not json.loads(summary.read_text())


@pytest.mark.slow
def test_a_run_without_a_checkpoint_begins_anew(text, tmp_path, monkeypatch, one_device):
    poison(monkeypatch, nan=after(2))
    summary = go(tiny(text, "rewind"), tmp_path / "run")
    assert [action for *_, action in logged(tmp_path / "run")] == ["rewound to step 0"]
    assert (summary["step"], summary["rewinds"]) == (20, 1)
    assert runs.losses(tmp_path / "run").shape == (20, 3)
