"""Loss and gradients of a pipeline equal those of one device.

With two hops, and over steps of the optimiser, it is among the layouts of `test_layouts.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding

from deepseek_jax.model import params
from deepseek_jax.model.params import split
from deepseek_jax.model.transformer import build_model
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.train.step import make_gradients, tokens_spec

COUNT = 11  # micro-batches that count: odd, and below what pipe 8 needs


def gradients(config, sizes, tokens):
    """(gradients, Sums) of a step on tokens AB(S+1), as NumPy arrays."""
    mesh_config = dataclasses.replace(config.mesh, **sizes)
    config = dataclasses.replace(config, mesh=mesh_config)
    mesh, layout = small.mesh_of(sizes), meshes.layout(config)
    _, weights, bias = split(build_model(config.model, jax.random.key(0)))
    places = params.place(weights, lambda *a: NamedSharding(mesh, layout.storage(*a)))
    with jax.set_mesh(mesh):
        weights = jax.device_put(weights, places)
        tokens = jax.device_put(tokens, NamedSharding(mesh, tokens_spec(layout)))
        step = jax.jit(make_gradients(config, layout, mesh))
        out = step(weights, bias, tokens, jnp.int32(COUNT), jnp.float32(0.3))
    return jax.device_get(out)


CASES = {
    "4 ranks, 2 GPUs": (
        {"pipe": 4, "gpu": 2},
        {
            "model_layers": 4,
            "model_mtp_depth": 1,
            "layout_zero": 0,
            "layout_capacity_factor": 0.6,  # tokens need overflow rounds
            "layout_recompute": "full",
        },
    ),
    "8 ranks": (
        {"pipe": 8},
        {"model_layers": 8, "layout_recompute": "full", "layout_defer_weight_gradients": True},
    ),
    "V, 2 ranks, 2 GPUs": (
        {"pipe": 2, "gpu": 2},
        {
            "model_layers": 4,
            "layout_pipeline": "dualpipev",
            "layout_ramps": "skip",
        },
    ),
    "1F1B, 3 ranks, uneven": (
        {"pipe": 3},
        {"model_layers": 4, "layout_pipeline": "1f1b", "layout_stage_layers": (1, 2, 1)},
    ),
    "uneven, tensor": (
        {"pipe": 4, "tensor": 2},
        {
            "model_layers": 5,
            "model_dense_layers": 2,
            "layout_stage_layers": (2, 0, 1, 2),
            "layout_recompute": "report",
            "layout_defer_weight_gradients": True,
        },
    ),
}


# A minute each. `test_layouts.py` has a pipeline with MTP and another V, `test_two_batch.py` has
# overflow rounds in the passes of layers that a pipeline runs.
SLOW = {"4 ranks, 2 GPUs", "8 ranks", "V, 2 ranks, 2 GPUs"}

GIVEN = {
    "batch_sequences": 144,
    "batch_ramp_sequences": 64,
    "layout_zero": 1,
    "layout_dispatch": "two_hop",
}
# Settings of pipelines only, and one that `test_execution.py` shows to change no result.
OF_PIPELINES = ("layout_pipeline", "layout_ramps", "layout_stage_layers", "layout_recompute")


def drawn(config):
    shape = 18, 8, 17  # room for 18 micro-batches
    return np.random.default_rng(0).integers(0, config.model.vocab, shape, np.int32)


@functools.cache
def unpiped(node=1, gpu=1, tensor=1, **changes):
    config = small.config(**(GIVEN | changes))
    sizes = {"pipe": 1, "node": node, "gpu": gpu, "tensor": tensor}
    return gradients(config, sizes, drawn(config))


GRADIENTS = [
    pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW))
    for name, case in CASES.items()
]


@pytest.mark.parametrize("sizes, changes", GRADIENTS)
def test_gradients(sizes, changes):
    config = small.config(mesh_pipe=sizes["pipe"], **(GIVEN | changes))
    grads, sums = gradients(config, sizes, drawn(config))
    others = {name: size for name, size in sizes.items() if name != "pipe"}
    rest = {key: value for key, value in changes.items() if key not in OF_PIPELINES}
    want, want_sums = unpiped(**others, **rest)
    small.assert_close(sums, want_sums)
    small.assert_close(grads, want)
