"""A run that becomes NaN or infinite stops, and its checkpoints are sound."""

import pytest
import runs

from deepseek_jax.train import loop


def test_a_run_that_blows_up_names_the_step_and_keeps_a_good_checkpoint(
    text, tmp_path, monkeypatch, one_device
):
    normal = loop.token_schedule.hyper

    def absurd(config, *, step, tokens):
        hyper = normal(config, step=step, tokens=tokens)
        return loop.dataclasses.replace(hyper, learning_rate=float("inf") if step == 5 else 1e-3)

    monkeypatch.setattr(loop.token_schedule, "hyper", absurd)
    saves = {"every_steps": 3}
    with pytest.raises(loop.NotFinite, match=r"step 6 .*last good checkpoint is step 3"):
        loop.train(runs.tiny(text, checkpoint=saves), tmp_path / "run", screen=False)
    assert runs.checkpoints(tmp_path / "run") == [3]  # step 6 is not finite and was not saved
