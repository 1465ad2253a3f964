"""A run that becomes NaN or infinite stops, and its checkpoints are sound."""

import dataclasses

import jax
import numpy as np
import pytest
import runs
import small
from trainer import Trainer, with_schedule

from deepseek_jax.model import params
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


PIPELINE = dict(mesh_pipe=2, mesh_node=2, model_layers=4, batch_micro_sequences=4)


@pytest.fixture(
    scope="module",
    params=[
        {},
        pytest.param(PIPELINE, marks=pytest.mark.slow),
        pytest.param({**PIPELINE, "precision_scales": "free"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "pipeline", "pipeline, free scales"],
)
def first_step(request):
    """(names of all weights, function of changes of weights: loss and gradient norm in FP8)."""
    fp8 = dict(precision_recipe="fp8", optimizer_moments="bfloat16")
    config = small.config(model_d_model=160, model_mtp_depth=0, **fp8, **request.param)
    config = with_schedule(config, tokens=5000, learning_rate=3e-3, warmup_steps=3)
    trainer = Trainer(config)
    places = jax.tree.map(lambda x: x.sharding, trainer.state)
    start = jax.device_get(trainer.state)
    names = [weight.path for weight in params.describe(start.params)]

    def run(changes):
        weights = dict(zip(names, jax.tree.leaves(start.params), strict=True))
        for name, change in changes.items():
            weights[name] = change(weights[name].copy())
        changed = jax.tree.unflatten(jax.tree.structure(start.params), weights.values())
        trainer.state = jax.device_put(dataclasses.replace(start, params=changed), places)
        (metrics,) = trainer.run(1)
        return metrics["loss"].item(), metrics["grad_norm"].item()

    return names, run


def first(value):
    """A change of a weight: its first number becomes `value`."""

    def change(weight):
        weight.flat[0] = value
        return weight

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_in_fp8_no_weight_hides_what_is_no_number(first_step, value):
    """The loop stops where the loss or the norm of the gradient is no number."""
    names, run = first_step
    assert np.isfinite(run({})).all()
    hidden = [name for name in names if np.isfinite(run({name: first(value)})).all()]
    assert not hidden


def test_huge_numbers_are_scaled_in_fp8_or_stop_the_run(first_step):
    _, run = first_step
    loss, _ = run({})
    # W^UKV multiplies latents of 1e9: not one bit of the loss changes.
    latents, keys_values = "moe_layers.attention.kv_norm.scale", "moe_layers.attention.kv_up"
    scaled = {latents: lambda w: w * 2.0**30, keys_values: lambda w: w * 2.0**-30}
    assert run(scaled)[0] == loss
    # The head's softmax is one-hot: gradients of its input are as large as its weights.
    norm, larger = (run({"head.table": lambda w, k=k: w * 2.0**k})[1] for k in (50, 60))
    assert larger == pytest.approx(2**10 * norm, rel=1e-6)
    # Squares above float32's largest number: of a gradient, and of an activation in RMSNorm.
    assert not np.isfinite(run({"head.table": lambda w: w * 2.0**70})).all()
    assert not np.isfinite(run({"embedding.table": lambda w: w * 1e30})).all()
