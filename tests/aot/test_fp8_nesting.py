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
from deepseek_jax.precision import fp8_grouped, grouped
from deepseek_jax.precision.fp8_hopper import HopperProducts
from deepseek_jax.precision.fp8_tiles import dequantise_tiles, quantise_tiles
from deepseek_jax.precision.fp8_weights import Fp8Weight, Linear, quantise_blocks

LAYERS, DEVICES, ROWS, D, E = 2, 8, 512, 256, 2
AXES = ("node", "gpu")
HOPPER = HopperProducts(sms=112)
PLAN = grouped.plan(ROWS, E, ROWS)


def product(tiles, values, scales, sizes):
    whole = Fp8Weight(values, scales).dequantised(D, jnp.bfloat16)
    return PLAN.product(dequantise_tiles(tiles, jnp.bfloat16), whole, sizes)


def input_gradient(tiles, values, scales, sizes):
    sent, whole = dequantise_tiles(tiles, jnp.bfloat16), Fp8Weight(values, scales)
    return PLAN.rows_gradient((sent, whole.dequantised(D, jnp.bfloat16), sizes), sent)


def weight_gradient(x, d_out, sizes):
    x, d_out = (fp8_grouped.dequantise_rows(part, sizes, jnp.bfloat16) for part in (x, d_out))
    return PLAN.weight_gradient((x, x, sizes), d_out, (E, D, D), jnp.float32)


def by_kernel(method):
    def run(tiles, values, scales, sizes):
        return method(tiles, Fp8Weight(values, scales), sizes, dtype=jnp.bfloat16)

    return run


@jax.custom_vjp
def linear(x, weight, sizes):
    return forward(x, weight, sizes)[0]


def forward(x, weight, sizes):
    blocks = quantise_blocks(weight, Linear.whole("-io", weight.shape), power_of_two=True)
    out = lax.platform_dependent(
        quantise_tiles(x, power_of_two=True), blocks.values, blocks.scales, sizes,
        cuda=by_kernel(HOPPER.product), default=product,
    )  # fmt: skip
    return out, (fp8_grouped.quantise_rows(x, sizes, True), blocks.values, blocks.scales, sizes)


def backward(kept, d_out):
    x, values, scales, sizes = kept
    d_x = lax.platform_dependent(
        quantise_tiles(d_out, power_of_two=True), values, scales, sizes,
        cuda=by_kernel(HOPPER.input_gradient), default=input_gradient,
    )  # fmt: skip
    d_weight = lax.platform_dependent(
        x, fp8_grouped.quantise_rows(d_out, sizes, True), sizes,
        cuda=HOPPER.grouped_weight_gradient, default=weight_gradient,
    )  # fmt: skip
    return d_x, d_weight, None


linear.defvjp(forward, backward)


def gradients(mesh):
    """Function of rows, weights and sizes on the mesh -> gradients of rows and weights."""

    def send(x):
        x = lax.all_to_all(x.reshape(DEVICES, -1, D), AXES, 0, 0, tiled=True)
        return x.reshape(-1, D)

    def local(x, weights, sizes):
        @jax.checkpoint
        def layer(x, weight):
            return x + send(linear(send(x), weight, sizes)), None

        def loss(x, weights):
            out = lax.scan(layer, x, weights)[0].astype(jnp.float32)
            return (out**2).mean()

        return jax.grad(loss, (0, 1))(x, weights)

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

    Recomputation brings back the tiles of the input, and multiplies nothing.
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
    assert collections.Counter(names) == {"fp8_product": 2, "fp8_outer": 1}


def test_a_program_for_cpus_has_no_kernel():
    mesh = jax.make_mesh((2, 4), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    given = [jax.ShapeDtypeStruct(*each) for each in SHAPES]
    assert "mosaic_gpu" not in gradients(mesh).lower(*given).as_text()
