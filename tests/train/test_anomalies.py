"""Limits of loss and gradient norm, and what is kept of a run's anomalies."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from reports import SUMMARY, row
from trainer import Trainer, with_schedule

from deepseek_jax.config import AnomalyConfig
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.train import plots, token_schedule
from deepseek_jax.train.anomalies import AnomalyFile, History, Limits, read_anomalies
from deepseek_jax.train.step import abstract_arguments

MOST = Limits().loss


def config(**changes) -> AnomalyConfig:
    values = dict(rule="stop", window=8, loss_score=20.0, grad_norm_score=100.0, most=3)
    return AnomalyConfig(**{**values, **changes})


def told(history: History, losses, norms, first: int = 1) -> list[str]:
    """Kinds of steps, in order."""
    both = zip(losses, norms, strict=True)
    return [history.judge(n, *pair)[0] for n, pair in enumerate(both, first)]


def reference(values, score: float, least: float) -> float:
    """median + score * max(1.4826 MAD, least * median), in float64 and by hand."""
    ordered = sorted(values)
    median = (ordered[3] + ordered[4]) / 2
    distances = sorted(abs(value - median) for value in values)
    spread = 1.4826 * (distances[3] + distances[4]) / 2
    return float(np.float32(median + score * max(spread, least * median)))


def test_limits_are_median_and_mad_of_the_steps_that_the_loop_has_read():
    rng = np.random.default_rng(0)
    losses, norms = 3 + 0.2 * rng.normal(size=20), np.exp(rng.normal(size=20) / 4)
    history = History(config())
    for step in range(1, 21):
        limits = history.limits(step)
        if step <= 9:  # fewer than eight steps up to the one before the last
            assert limits == Limits()
        else:
            seen = slice(step - 10, step - 2)
            assert limits.loss == reference(losses[seen], 20.0, 0.01)
            assert limits.grad_norm == reference(norms[seen], 100.0, 0.1)
        assert history.judge(step, losses[step - 1], norms[step - 1]) == ("", limits)


def test_equal_values_have_room_above_them():
    history = History(config())
    told(history, [2.0] * 12, [1.0] * 12)
    assert history.limits(13) == Limits(float(np.float32(2.4)), 11.0)


@pytest.mark.parametrize(
    "loss, norm, kind",
    [
        (2.0, 1.0, ""),
        (2.41, 1.0, "loss spike"),
        (0.1, 1.0, ""),  # below all others is no anomaly
        (2.0, 11.5, "gradient norm spike"),
        (np.nan, 1.0, "not finite"),
        (2.0, np.inf, "not finite"),
    ],
)
def test_kinds_of_anomalies(loss, norm, kind):
    history = History(config())
    told(history, [2.0] * 12, [1.0] * 12)
    assert told(history, [loss], [norm], 13) == [kind]
    assert history.streak == bool(kind)


def test_the_program_that_skips_has_the_last_word():
    history = History(config())
    assert history.judge(1, 2.0, 1.0, True)[0] == "gradient norm spike"
    assert history.judge(2, 2.0, 1.0, False)[0] == ""
    assert history.streak == 1


def test_scores_of_zero_leave_only_what_is_not_finite():
    history = History(config(loss_score=0.0, grad_norm_score=0.0))
    assert told(history, [2.0] * 12 + [1e30, np.nan], [1.0] * 12 + [1e30, 1.0])[-2:] == [
        "", "not finite",
    ]  # fmt: skip
    assert history.state()["anomalies"]["values"] == []
    history = History(config(grad_norm_score=0.0))
    told(history, [2.0] * 12, [1.0] * 12)
    assert history.limits(13) == Limits(float(np.float32(2.4)), MOST)


def test_a_history_from_a_checkpoint_has_the_same_limits_to_the_bit():
    rng = np.random.default_rng(1)
    losses, norms = rng.normal(size=(2, 40)).astype(np.float32) + 3
    whole = History(config())
    kinds = told(whole, losses.tolist(), norms.tolist())
    for at in range(41):
        part = History(config())
        told(part, losses[:at].tolist(), norms[:at].tolist())
        kept = json.loads(json.dumps(part.state()))
        resumed = History(config(), kept.get("anomalies"))
        assert resumed.limits(at + 1) == part.limits(at + 1)
        assert told(resumed, losses[at:].tolist(), norms[at:].tolist(), at + 1) == kinds[at:]
        assert resumed.state() == whole.state()


def test_a_lasting_change_becomes_the_level():
    history = History(config())
    told(history, [2.0] * 20, [1.0] * 20)
    kinds = told(history, [3.0] * 20, [1.0] * 20, 21)
    assert kinds[0] == "loss spike" and kinds[-12:] == [""] * 12


def test_a_streak_ends_after_a_window_of_good_steps():
    history = History(config())
    told(history, [np.nan, 2.0, np.nan] + [2.0] * 7, [1.0] * 10)
    assert history.streak == 2 and not history.too_many()
    told(history, [2.0], [1.0], 11)
    assert history.streak == 0
    told(history, [np.nan] * 3, [1.0] * 3, 12)
    assert history.too_many()


def test_a_healthy_run_has_no_spikes():
    """Seven precision recipes with three seeds each; a row is every tenth step of 1,000."""
    file = Path(__file__).parents[2] / "docs" / "data" / "precision.json"
    runs = [
        run for seeds in json.loads(file.read_text())["runs"].values() for run in seeds.values()
    ]
    assert len(runs) > 10
    for run in runs:
        history = History(config(window=32))
        assert set(told(history, run["loss"], run["mtp_loss"])) == {""}
        assert history.limits(101).loss < 2.5 * run["loss"][-1]  # limits that a spike would pass


def line(step: int, last: int) -> dict:
    return {"step": step, "tokens": 100 * step, "sequences": [last - 7, last], "kind": "loss spike"}


def test_anomalies_of_data_that_will_come_again_are_dropped(tmp_path):
    path = tmp_path / "anomalies.jsonl"
    for step, last in ((3, 23), (5, 39), (4, 47)):
        AnomalyFile(path).append(line(step, last))
    with path.open("a") as file:
        file.write('{"step": 9, "tok')  # the process was killed
    assert [found["step"] for found in read_anomalies(path)] == [3, 5, 4]
    AnomalyFile(path).begin(40)
    assert [found["step"] for found in read_anomalies(path)] == [3, 5]
    AnomalyFile(path).begin(0)
    assert read_anomalies(path) == []


def test_the_loss_picture_marks_anomalies():
    loss, _ = plots._losses([row(step) for step in (1, 2, 3)], SUMMARY, [line(2, 15)]).axes
    marks = [drawn for drawn in loss.lines if drawn.get_label() == "anomalies (1)"]
    assert [mark.get_xdata()[0] for mark in marks] == [200]


def test_a_program_that_never_skips_knows_no_limits():
    counts = {}
    for rule in ("stop", "rewind", "skip"):
        changed = small.config(anomaly_rule=rule)
        mesh = small.mesh_of({})
        counts[rule] = len(abstract_arguments(changed, meshes.layout(changed), mesh))
    assert counts == {"stop": 3, "rewind": 3, "skip": 4}


LAYOUTS = {
    "alone": {},
    "ZeRO-3, every axis": dict(mesh_replica=2, mesh_gpu=2, mesh_tensor=2, layout_zero=3),
    "a pipeline": dict(mesh_pipe=2, mesh_gpu=2),
}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.slow] if "pipe" in name else []) for name in LAYOUTS],
)
def test_a_skipped_step_leaves_every_bit_but_its_number(layout):
    changes = {**LAYOUTS[layout], "anomaly_rule": "skip"}
    changes |= dict(model_mtp_depth=1 if "pipe" in layout else 0, layout_rules=small.NARROW)
    trainer = Trainer(with_schedule(small.config(**changes), learning_rate=1e-2, warmup_steps=0))
    fine = Limits(np.float32(MOST), np.float32(MOST))
    batch = trainer.config.batch
    shape = (token_schedule.most_micro_batches(batch), batch.micro_sequences, batch.length + 1)
    tokens = np.random.default_rng(0).integers(0, 64, shape, np.int32)
    hyper = token_schedule.Hyper(1e-2, 0.3, 0.01)
    nan = token_schedule.Hyper(1e-2, float("nan"), 0.01)

    def step(limits, how=hyper):
        """(metrics, number of the step, every other leaf of the state)"""
        metrics = trainer.step(tokens, shape[0], how, limits)
        state = jax.device_get(trainer.state)
        return metrics, state.step, jax.tree.leaves((state.params, state.bias, state.opt_state))

    first, number, before = step(fine)
    assert not first["skipped"] and number == 1
    loss, norm = first["loss"], first["grad_norm"]
    cases = [
        (Limits(np.float32(loss / 2), fine.grad_norm), hyper),
        (Limits(fine.loss, np.float32(norm / 1e3)), hyper),
    ]
    if trainer.config.model.mtp_depth:
        cases.append((fine, nan))
    for count, (limits, how) in enumerate(cases, 2):
        metrics, number, after = step(limits, how)
        assert metrics["skipped"] and number == count
        for was, now in zip(before, after, strict=True):
            np.testing.assert_array_equal(now, was)
    metrics, _, after = step(Limits(metrics["loss"], fine.grad_norm) if len(cases) < 3 else fine)
    assert not metrics["skipped"]  # a value at its limit is no anomaly
    moved = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(moved) > len(moved) / 2
