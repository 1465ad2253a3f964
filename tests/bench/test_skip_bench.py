"""`bench skip`: ratios of steps that take a known time."""

import dataclasses
import time

import pytest
import small

from deepseek_jax.bench import skip, train


def test_ratios_of_steps_in_turns(monkeypatch):
    """A step under `skip` sleeps three times as long as one under `stop`."""

    def of(config):
        pause = 0.03 if config.anomaly.rule == "skip" else 0.01
        return train.Stepper(config, lambda: time.sleep(pause), "", 7, 0.0, 0.0)

    monkeypatch.setattr(train, "sized", lambda config: config)
    monkeypatch.setattr(train.Stepper, "of", of)
    found = skip.measure(small.config(), rounds=3, steps=3)
    assert found["least"] <= found["skip_over_stop"] <= found["greatest"]
    assert found["skip_over_stop"] == pytest.approx(3.0, rel=0.3)
    assert [row["rule"] for row in found["steps"]] == ["stop", "skip"]
    assert [row["temporary_bytes"] for row in found["steps"]] == [7, 7]


@pytest.mark.slow
def test_a_step_may_skip():
    """The step under `skip` is given limits, and its metrics tell whether it was left out."""
    plain = small.config(model_layers=1, model_dense_layers=1, model_mtp_depth=0)
    rule = dataclasses.replace(plain.anomaly, rule="skip")
    metrics = train.Stepper.of(dataclasses.replace(plain, anomaly=rule)).step()
    assert not metrics["skipped"]
    assert "skipped" not in train.Stepper.of(plain).step()
