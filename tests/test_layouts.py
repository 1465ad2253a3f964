"""Layouts never change results: eight of them against one device, 20 steps, losses to 1e-5.

Every part of the recipe changes in these steps: batch ramp over accumulated micro-batches, warm-up
and cosine, router bias, balance loss, and where there is MTP its weight. The wide init (0.1) keeps
the router's scores apart: a near-tie of 6e-8, which a narrow init makes likely, is decided by the
order of a float32 sum.
"""

import functools

import chex
import jax
import numpy as np
import pytest
import small
from trainer import Trainer, initial, with_schedule

STEPS = 20
LAYOUTS = {
    "experts over 8 gpus": dict(gpu=8),
    "every axis but pipe, MTP, several rounds": dict(
        node=2, gpu=2, tensor=2, mtp=1, capacity_factor=0.6, recompute="full"
    ),
    "flat, two micro-batches in flight": dict(
        node=2, gpu=2, dispatch="flat", micro_batches_in_flight=2
    ),
    "ZeRO-1 with experts": dict(replica=2, gpu=4, zero=1),
    "ZeRO-3 with tensor, MTP, recomputing": dict(
        replica=2, gpu=2, tensor=2, zero=3, mtp=1, recompute="report", rules=small.NARROW
    ),
    # Recomputing all, so that the second hop brings the tokens again.
    "a pipeline, MTP": dict(pipe=2, node=2, gpu=2, zero=1, mtp=1, recompute="full"),
    "a pipeline in a V, MTP": dict(
        pipe=2, gpu=2, mtp=1, pipeline="dualpipev", ramps="skip", recompute="full"
    ),
    "dense dispatch": dict(replica=4, dispatch="reference"),
}


def trained(layout, mtp):
    mesh = {f"mesh_{k}": v for k, v in layout.items() if k in small.MESH_AXES}
    rest = {f"layout_{k}": v for k, v in layout.items() if k not in small.MESH_AXES}
    config = small.config(model_mtp_depth=mtp, batch_ramp_tokens=1500, **mesh, **rest)
    config = with_schedule(
        config, tokens=5000, learning_rate=3e-3, warmup_steps=3, decay_start=2000, decay_end=4000,
        decayed_learning_rate=1e-3, final_start=4500, final_learning_rate=5e-4, bias_speed=0.01,
        bias_stop=4000, mtp_switch=3000, balance_alpha=0.01,
    )  # fmt: skip
    trainer = Trainer(config)
    return trainer.run(STEPS), trainer.params()


@functools.cache
def alone(mtp):
    return trained({}, mtp)


# The V has a comparison of gradients with one device, too (`train/test_pipeline_step.py`).
MARKS = {"experts over 8 gpus": pytest.mark.smoke, "a pipeline in a V, MTP": pytest.mark.slow}
CASES = [
    pytest.param(layout, id=name, marks=[MARKS[name]] if name in MARKS else [])
    for name, layout in LAYOUTS.items()
]


@pytest.mark.parametrize("layout", CASES)
def test_a_layout_changes_nothing(layout):
    mtp = layout.get("mtp", 0)
    want, want_params = alone(mtp)
    got, params = trained({name: value for name, value in layout.items() if name != "mtp"}, mtp)
    for name in ("loss", "mtp_loss", "grad_norm", "balance_loss"):
        np.testing.assert_allclose([m[name] for m in got], [m[name] for m in want], rtol=1e-5)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours["expert_load"], theirs["expert_load"])
    small.assert_close(
        params, want_params, rtol=1e-4
    )  # Adam divides by the root of small second moments


def test_the_run_moves():
    """The loss falls in these steps, so that the comparison of layouts means something."""
    metrics, params = alone(1)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.01
    start = jax.tree.leaves(Trainer(small.config(model_mtp_depth=1)).params())
    assert all(
        not np.array_equal(a, b) for a, b in zip(start, jax.tree.leaves(params), strict=True)
    )


def test_a_fresh_state_is_the_same_everywhere():
    every = dict(mesh_node=2, mesh_gpu=2, mesh_tensor=2, layout_zero=3)
    one, many = (
        initial(small.config(model_mtp_depth=1)),
        initial(small.config(model_mtp_depth=1, **every)),
    )
    chex.assert_trees_all_equal(jax.device_get(many), jax.device_get(one))
