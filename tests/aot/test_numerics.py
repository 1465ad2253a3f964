"""Roundings and sums of programs that are compiled for a GPU, which a CPU compiles otherwise.

Nothing here runs. The steps of whole models take minutes to compile: only with `-m slow`.
"""

import re

import jax
import jax.numpy as jnp
import pytest
import small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.aot import cluster, hlo, layer
from deepseek_jax.config import MeshConfig
from deepseek_jax.parallel.experts import reference
from deepseek_jax.precision import weight_gradients
from deepseek_jax.precision.einsum import table_rows
from deepseek_jax.precision.fp8_weights import Linear
from deepseek_jax.precision.payload import FP8_PAYLOAD
from deepseek_jax.precision.recipes import BFLOAT16
from deepseek_jax.precision.recipes import FP8 as FP8_RECIPE
from deepseek_jax.precision.rounding import rounded
from deepseek_jax.serve.latent_cache import FORMATS, Latents
from deepseek_jax.train import step

pytestmark = pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "")

WIDE, NARROW = jnp.float32, jnp.bfloat16
FP8 = "f8e4m3fn"


def for_a_gpu(fn, *arguments):
    """fn lowered for one virtual GPU; arguments are (shape, dtype)."""
    mesh = cluster.mesh(MeshConfig(pipe=1, replica=1, node=1, gpu=1, tensor=1))
    place = NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        return jax.jit(fn).lower(
            *(jax.ShapeDtypeStruct(*argument, sharding=place) for argument in arguments)
        )


def compiled(lowered):
    return hlo.parse(cluster.compile_for(lowered).as_text())


def made(module, dtype):
    """Casts to a type, those in fusions too."""
    lines = (line for each in module.computations.values() for line in each.values())
    return sum(line.opcode == "convert" and line.arrays[0].dtype == dtype for line in lines)


def asked_for(lowered):
    return len(re.findall(r"stablehlo\.convert .*-> tensor<[\dx]*f8E4M3FN>", lowered.as_text()))


def test_a_rounding_is_not_undone():
    """XLA drops a cast that the program undoes, unless a barrier stands between."""
    types = {"f8e4m3fn": jnp.float8_e4m3fn, "f8e5m2": jnp.float8_e5m2, "bf16": jnp.bfloat16}

    def there_and_back(x):
        return [rounded(x, dtype).astype(x.dtype) for dtype in types.values()]

    module = compiled(for_a_gpu(there_and_back, ((64, 256), WIDE)))
    assert {name: made(module, name) for name in types} == dict.fromkeys(types, 1)


@pytest.mark.parametrize("recipe", [FP8_RECIPE, BFLOAT16], ids=lambda recipe: recipe.name)
def test_operands_of_linear_layers_are_rounded(recipe):
    """Forward and both gradients of a linear layer, and of the experts': none is left in BF16.

    In FP8 each layer quantises x along both axes, its gradient along both, and its weight once.
    """
    linear, experts = Linear.whole("io", (256, 384)), Linear.whole("-io", (2, 256, 384))

    def local(x, weight, rows, weights, sizes):
        weight = recipe.prepare(weight, sensitive=False, linear=linear)
        weights = recipe.prepare(weights, sensitive=False, linear=experts)

        def plain(weight, x):
            return recipe.einsum("MD,DF->MF", x, weight)

        def grouped(weights, rows):
            return recipe.grouped(rows, weights, sizes, likely=512)

        def gradients(fn, weights, x):
            out, vjp = weight_gradients.vjp(fn, weights, x)
            return vjp(out * out)

        return gradients(plain, weight, x), gradients(grouped, weights, rows)

    shapes = ((512, 256), NARROW), ((256, 384), WIDE), ((512, 256), NARROW), ((2, 256, 384), WIDE)
    lowered = for_a_gpu(local, *shapes, ((2,), jnp.int32))
    assert asked_for(lowered) == (10 if recipe is FP8_RECIPE else 0)
    assert made(compiled(lowered), FP8) >= asked_for(lowered)


def test_what_does_not_travel_is_rounded_all_the_same():
    """Tokens, gradients and cached latents that FP8 encodes and decodes in one program."""

    def local(x, d_out, latent, key):
        travelled = reference._travel(x, FP8_PAYLOAD)
        (d_x,) = jax.vjp(lambda x: reference._return(x, FP8_PAYLOAD), x)[1](d_out)
        empty = FP8_PAYLOAD.encode(jnp.zeros((1, 2, 8, 128)))
        cache = Latents(empty, jnp.zeros((1, 2, 8, 16), FORMATS["fp8"].dtype), FP8_PAYLOAD)
        cache = cache.write(0, jnp.zeros((2, 1), jnp.int32), (latent, key))
        return travelled, d_x, cache.read(0, NARROW)

    rows = ((64, 256), NARROW)
    lowered = for_a_gpu(local, rows, rows, ((2, 1, 128), NARROW), ((2, 1, 16), NARROW))
    assert asked_for(lowered) == 4
    assert made(compiled(lowered), FP8) >= 3  # the fourth is of zeros, known to the compiler


def test_a_table_s_gradient_is_summed_in_order_and_in_float32():
    """Rows that many tokens read: a scatter with equal places would add atomically."""

    def gradient(table, index, d_rows):
        return jax.vjp(lambda table: table_rows(table, index), table)[1](d_rows)[0]

    arguments = ((512, 64), NARROW), ((3000,), jnp.int32), ((3000, 64), NARROW)
    found = list(hlo.sums(compiled(for_a_gpu(gradient, *arguments))))
    assert any(line.opcode == "scatter" for line, _ in found)
    assert not wrong(found)


def wrong(found):
    """Sums that are not in float32, and scatters that add to one place twice."""
    return [
        (line.opcode, dtype, line.op_name)
        for line, dtype in found
        if dtype != "f32" or (line.opcode == "scatter" and not line.unique)
    ]


LAYOUTS = {
    "plain": {},
    "two in flight": dict(mesh_node=2, mesh_gpu=2, layout_micro_batches_in_flight=2),
    "ZeRO-3": dict(mesh_replica=2, mesh_node=2, layout_zero=3),
    "pipeline": dict(mesh_pipe=2, mesh_node=2, layout_zero=1),
    "1F1B": dict(mesh_pipe=2, mesh_node=2, layout_pipeline="1f1b"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_sums_of_a_step(layout):
    """Sums of activations over tensor-parallel ranks stay in the recipe's type: not here."""
    config = small.config(
        precision_recipe="bfloat16", precision_dispatch="fp8", optimizer_moments="bfloat16",
        layout_recompute="report", layout_rules=small.NARROW, **layout,
    )  # fmt: skip
    lowered = step.lower(config, cluster.mesh(config.mesh))
    module = compiled(lowered)
    assert not wrong(hlo.sums(module))
    assert made(module, FP8) >= asked_for(lowered) > 0


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["reference", "flat"])
def test_fp8_values_of_a_layer(dispatch):
    config = small.config(precision_dispatch="fp8", layout_dispatch=dispatch)
    lowered = layer.lower(config, cluster.mesh(config.mesh))
    assert made(compiled(lowered), FP8) == asked_for(lowered) == 2
