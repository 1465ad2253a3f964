"""`bench train`: the same steps as `transformers`, another model refused, and all rows."""

import importlib.util
import time

import jax
import pytest
import small

from deepseek_jax.bench import hugging_face, train


def config(**changes):
    """One MoE layer, quick to compile, and a learning rate that shows in three steps."""
    return small.config(
        model_layers=1,
        model_dense_layers=0,
        model_mtp_depth=0,
        schedule_warmup_steps=0,
        schedule_learning_rate=1e-2,
        **changes,
    )


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="torch and transformers are not installed",
)
def test_steps_are_those_of_transformers():
    """Without the two things that `transformers` leaves out."""
    plain = config(schedule_bias_speed=0.0, schedule_balance_alpha=0.0, optimizer_clip=0.5)
    ours = train.Stepper.of(plain)
    theirs = train.trainer(plain, jax.device_get(ours.step()))
    losses = []
    for _ in range(3):
        got, want = ours.step(), theirs.step()
        for name, value in want.items():
            assert float(got[name]) == pytest.approx(value, rel=train.TOLERANCES[name]), name
        assert want["grad_norm"] > plain.optimizer.clip
        losses.append(want["loss"])
    assert losses[0] - losses[2] > 0.1  # AdamW moved the weights far more than a tolerance


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_another_model_is_refused(monkeypatch, name):
    class Other:
        def __init__(self, *_):
            pass

        def step(self):
            return {"loss": 4.0, "grad_norm": 2.0}

    monkeypatch.setattr(hugging_face, "TorchTrainer", Other)
    train.trainer(config(), Other().step())
    ours = Other().step() | {name: 4.001 if name == "loss" else 2.001}
    with pytest.raises(ValueError, match=f"transformers has {name} .* do not train the same model"):
        train.trainer(config(), ours)


def test_rows(monkeypatch):
    """Of steps that return at once, beside others that take longer."""

    class Slow:
        def step(self):
            time.sleep(0.01)

    metrics = {"loss": 4.0, "grad_norm": 2.0}
    seconds = dict(build_seconds=1.0, compile_seconds=2.0)
    stepper = train.Stepper(config(), lambda: metrics, "", 0, **seconds)
    monkeypatch.setattr(train, "sized", lambda _: config())
    monkeypatch.setattr(train.Stepper, "of", lambda _: stepper)
    monkeypatch.setattr(train, "matmul_flops_per_second", lambda: 1e9)
    monkeypatch.setattr(hugging_face, "installed", lambda: True)
    monkeypatch.setattr(train, "trainer", lambda _, ours: Slow() if ours == metrics else None)
    found = train.measure(config(), rounds=3, steps=1)
    ratios = [row["ours"] / row["hugging_face"] for row in found["pairs"]]
    assert [row["of_hugging_face"] for row in found["pairs"]] == pytest.approx(ratios)
    assert found["of_hugging_face"] == pytest.approx(sorted(ratios)[1]) and len(ratios) == 3
    assert 1 < found["hugging_face"] < stepper.tokens / 0.01 < found["tokens_per_second"]
