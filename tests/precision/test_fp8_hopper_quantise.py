"""Quantisers for Hopper on the types of the portable form, which they must equal to the bit."""

import dataclasses

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hard_tiles import broken

from deepseek_jax.precision.expert_tiles import dequantise_rows, quantise_rows
from deepseek_jax.precision.fp8_hopper_quantise import (
    HopperQuantiser,
    takes_weight,
)
from deepseek_jax.precision.fp8_quantise_problems import further_problems, problems
from deepseek_jax.precision.fp8_sources import FromKept, FromSwiGLU, Plain
from deepseek_jax.precision.fp8_tiles import E4M3, Tiles, dequantise_tiles, quantise_tiles
from deepseek_jax.precision.fp8_weights import Linear, quantise_blocks
from deepseek_jax.precision.swiglu import swiglu
from deepseek_jax.precision.token_tiles import in_rows, quantise_tokens

pytestmark = pytest.mark.usefixtures("strict_dtypes")

HOPPER = HopperQuantiser(interpreted.GPU)
SLOW = {"x, rows", "x, tokens", "kept, tokens"}  # as others are
PROBLEMS = [
    pytest.param(problem, id=problem.name, marks=[pytest.mark.slow] if problem.name in SLOW else [])
    for problem in (*problems(HOPPER), *further_problems(HOPPER))
]
BFLOAT16 = jnp.bfloat16


def normal(*shape, seed=0, dtype=BFLOAT16):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_equal(got, want):
    """Equal trees: types, shapes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        bits = (np.asarray(x).view(f"u{x.dtype.itemsize}") for x in (one, other))
        np.testing.assert_array_equal(*bits)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems(problem):
    inputs = jax.tree.map(jnp.asarray, problem.inputs)
    want = jax.jit(problem.portable)(*inputs)
    leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(want)]
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves)
    assert_equal(interpreted.run(jax.jit(problem.kernel), *inputs), want)


def test_swiglu_of_any_gate():
    """Its exponential is the interpreter's, which is that of XLA on a CPU."""
    gate_up, scale = normal(128, 256), normal(128, seed=1, dtype=jnp.float32)
    got = interpreted.run(jax.jit(HOPPER.rows), FromSwiGLU(gate_up, scale))
    x = jax.jit(swiglu)(gate_up, scale)
    assert_equal(got, jax.jit(lambda x: quantise_tiles(x, power_of_two=True))(x))


def test_sources_are_the_layers_outputs():
    gate_up, scale = normal(24, 512), normal(24, seed=1, dtype=jnp.float32)
    x = jax.jit(swiglu)(gate_up, scale)
    assert_equal(jax.jit(FromSwiGLU.portable)(FromSwiGLU(gate_up, scale)), x)
    tiles = jax.jit(lambda x: quantise_tiles(x, power_of_two=True))(gate_up)
    again = jax.jit(lambda tiles: dequantise_tiles(tiles, BFLOAT16))(tiles)
    assert_equal(jax.jit(FromKept.portable)(FromKept(tiles)), again)


def test_tiles_of_experts_have_their_tokens_in_one_order():
    """So a product of two of them, over the tokens of a tile, is that of the rows themselves."""
    x, y, sizes = normal(180, 40), normal(180, 24, seed=1), np.array([70, 0, 101])
    device_sizes = jnp.asarray(sizes, jnp.int32)

    @jax.jit
    def quantised(x):
        tiles = quantise_rows(x, device_sizes, True)
        turned = quantise_tokens(x, device_sizes, True)
        back = in_rows(turned, len(x), device_sizes)
        return turned, dequantise_rows(tiles, device_sizes, jnp.float32), (back, tiles)

    def float64(x):
        turned, rows, (back, tiles) = quantised(x)
        assert_equal(back, tiles)
        values = np.asarray(turned.values, np.float64).reshape(len(turned.values), -1, 128)
        return values * np.asarray(turned.scales, np.float64).T[..., None], np.asarray(rows, "f8")

    (left, rows_left), (right, rows_right) = float64(x), float64(y)  # DT128 and MD
    got = np.einsum("KTB,NTB->TKN", left, right)
    want = [rows_left[a:b].T @ rows_right[a:b] for a, b in ((0, 70), (70, 171))]
    assert np.abs(want).max() > 10
    np.testing.assert_allclose(got[:2], want, rtol=1e-12, atol=1e-12)
    assert not got[2:].any()


def test_a_block_with_nan_or_infinity():
    weight = jnp.asarray(broken(100, 120))
    linear = Linear.whole("io", weight.shape)
    got, turned = interpreted.run(jax.jit(lambda x: HOPPER.blocks_and_copy(x, linear)), weight)
    want = jax.jit(lambda x: quantise_blocks(x, linear, power_of_two=True))(weight)
    assert np.isnan(np.asarray(want.scales)).all()
    np.testing.assert_array_equal(got.scales, want.scales)
    assert np.isnan(turned.astype(np.float32)).all()


def test_what_stays_portable():
    tiles = Tiles(jnp.ones((8, 400), E4M3), jnp.ones((8, 4)))
    ones = jnp.ones(8)
    assert Plain(normal(8, 8)).fits and FromKept(tiles).fits and FromSwiGLU(normal(8, 8), ones).fits
    assert not Plain(ones[:, None]).fits and not FromSwiGLU(ones[:, None]).fits

    def taken(roles, sizes, shape=None, over=(), dtype=jnp.float32):
        linear = dataclasses.replace(Linear.whole(roles, sizes), over=over)
        return takes_weight(jax.ShapeDtypeStruct(shape or sizes, dtype), linear)

    assert taken("iio", (2, 64, 256), (3, 2, 64, 256))  # a stack of layers
    assert taken("-ioo", (4, 256, 2, 64), (1, 256, 2, 64))  # some of the experts
    assert not taken("oi", (256, 128)) and not taken("io", (256, 128), dtype=BFLOAT16)
    assert not taken("io", (256, 128), (128, 128))
    assert not taken("io", (256, 128), over=("tensor",))
