"""FP8 kernels inside the transformations of a training step, compiled for eight virtual H100s.

Two layers in a scan, each recomputed in backward: an all-to-all, a linear layer for each of two
experts, an all-to-all back. A layer chooses its kernels by platform, inside `shard_map`.
"""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.aot import cluster
from deepseek_jax.config import MeshConfig
from deepseek_jax.kernels.kernel_names import OUTER, PRODUCT, QUANTISE
from deepseek_jax.precision import weight_gradients
from deepseek_jax.precision.fp8_weights import Linear
from deepseek_jax.precision.recipes import FP8

LAYERS, DEVICES, ROWS, D, E = 2, 8, 512, 256, 2
AXES = ("node", "gpu")
RECIPE = FP8.with_kernels(FP8.known_kernels, sms=112)


def gradients(mesh):
    """Function of rows, weights and sizes on the mesh -> gradients of rows and weights."""

    def send(x):
        x = lax.all_to_all(x.reshape(DEVICES, -1, D), AXES, 0, 0, tiled=True)
        return x.reshape(-1, D)

    def local(x, weights, sizes):
        linear = Linear.whole("-io", (E, D, D))
        prepared = RECIPE.prepare(weights, sensitive=False, linear=linear)

        @jax.checkpoint
        def layer(x, weight):
            return x + send(RECIPE.grouped(send(x), weight, sizes, ROWS)), None

        def loss(weights, x):
            out = lax.scan(layer, x, weights)[0].astype(jnp.float32)
            return (out**2).mean()

        d_weights, d_x = weight_gradients.vjp(loss, prepared, x)[1](jnp.float32(1))
        return d_x, d_weights

    specs = P(AXES), P(None, AXES)
    return jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(*specs, P(AXES)), out_specs=specs, check_vma=False
        )
    )


SHAPES = (
    ((DEVICES * ROWS, D), jnp.bfloat16),
    ((LAYERS, DEVICES * E, D, D), jnp.float32),
    ((DEVICES * E,), jnp.int32),
)


@pytest.mark.slow  # `test_products.py` and `test_pipelined_step.py` count those of the recipe
@pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "")
def test_kernels_of_a_step():
    """One product forward, two backward, once in the text for all layers.

    Quantised are the weights; the rows of x forward; its tokens again in backward, and both of the
    gradient. Recomputation multiplies nothing.
    """
    mesh = cluster.mesh(MeshConfig(pipe=1, replica=1, node=2, gpu=4, tensor=1))
    specs = P(AXES), P(None, AXES), P(AXES)
    given = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(SHAPES, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        lowered = gradients(mesh).lower(*given)
    lines = cluster.compile_for(lowered).as_text().splitlines()
    kernels = [line for line in lines if 'custom_call_target="mosaic_gpu_v2"' in line]
    names = (re.search(r'op_name="[^"]*/(fp8_\w+)/', line)[1] for line in kernels)
    assert collections.Counter(names) == {PRODUCT: 2, OUTER: 1, QUANTISE: 5}


def test_a_program_for_cpus_has_no_kernel():
    mesh = jax.make_mesh((2, 4), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    given = [jax.ShapeDtypeStruct(*each) for each in SHAPES]
    assert "mosaic_gpu" not in gradients(mesh).lower(*given).as_text()
