"""Inputs with tiles, and SwiGLU as an input: the bits of the numbers that they stand for."""

import dataclasses
import functools

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.kernels.kernel_names import QUANTISE
from deepseek_jax.precision import weight_gradients
from deepseek_jax.precision.fp8_form import Fp8Form
from deepseek_jax.precision.fp8_hopper import HopperProducts
from deepseek_jax.precision.fp8_sources import FromKept, FromSwiGLU, Plain, source_of
from deepseek_jax.precision.fp8_tiles import Tiles, dequantise_tiles, quantise_tiles
from deepseek_jax.precision.fp8_weights import Linear
from deepseek_jax.precision.linear_input import SwiGLU, TiledArray, in_dtype, numbers
from deepseek_jax.precision.recipes import BFLOAT16, FP8, recipe
from deepseek_jax.precision.swiglu import swiglu

pytestmark = pytest.mark.usefixtures("strict_dtypes")

M, K, N, E = 200, 200, 136, 3  # no size is a multiple of 128
SIZES = jnp.asarray([130, 0, 61], jnp.int32)  # the last 9 rows are nobody's
KERNELS = FP8.with_kernels(FP8.known_kernels, sms=132)


def normal(*shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def tiled(*shape, seed=0):
    """Rows of unequal size, rounded to tiles, of which one has zeros alone."""
    size = 2.0 ** np.random.default_rng(seed).integers(-9, 9, (shape[0], 1))
    x = normal(*shape, seed=seed) * jnp.asarray(size, jnp.bfloat16)
    tiles = quantise_tiles(x.at[7].set(0), power_of_two=True)
    return TiledArray(dequantise_tiles(tiles, jnp.bfloat16), tiles)


def prepared(fp8, *shape):
    linear = Linear.whole("-io" if len(shape) == 3 else "io", shape)
    return fp8.prepare(normal(*shape, seed=9, dtype=jnp.float32), sensitive=False, linear=linear)


def pulled(layer, weight, x, d_out):
    """Output, and gradients of the weight and of the array of x; jitted."""

    @jax.jit
    def run(x, d_out):
        out, pull = weight_gradients.vjp(layer, weight, x)
        d_weight, d_x = pull(d_out)
        return numbers(out), d_weight, numbers(d_x)

    return run(x, d_out)


def assert_same_bits(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and np.asarray(one, np.float32).any()
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.fixture(params=["portable", "kernels' portable twins"])
def fp8(request, monkeypatch):
    """FP8 in two forms: the second one chooses by platform, and this one is a CPU."""
    if request.param == "portable":
        return FP8
    monkeypatch.setattr(Fp8Form, "uses", lambda form, name: name in form.kernels)
    return KERNELS


def test_tiles_stand_for_their_array(fp8):
    weight, x, d_out = prepared(fp8, K, N), tiled(M, K), normal(M, N, seed=2)

    def layer(weight, x):
        return fp8.einsum("MK,KN->MN", x, weight)

    want = pulled(layer, weight, x.array, d_out)
    assert_same_bits(pulled(layer, weight, x, d_out), want)


def test_tiles_of_heads_are_those_of_all_heads_together(fp8):
    x, weight, d_out = tiled(M, 256), prepared(fp8, 256, N), normal(M, N, seed=2)
    want = pulled(lambda w, x: fp8.einsum("MK,KN->MN", x, w), weight, x.array, d_out)
    heads = jax.tree.map(lambda part: part.reshape(2, M // 2, 2, -1), x)
    of_heads = dataclasses.replace(weight, values=weight.values.reshape(2, 128, N))
    d_out = d_out.reshape(2, M // 2, N)
    got = pulled(lambda w, x: fp8.einsum("BSHW,HWD->BSD", x, w), of_heads, heads, d_out)
    assert_same_bits([each.reshape(like.shape) for each, like in zip(got, want, strict=True)], want)


def test_gradients_in_tiles_are_those_of_their_numbers(fp8):
    """Rows and the output's gradient are both as messages bring them."""
    weight, x, d_out = prepared(fp8, E, K, N), tiled(M, K), tiled(M, N, seed=2)
    want = pulled(lambda w, x: fp8.grouped(x, w, SIZES, M), weight, x.array, d_out.array)
    got = pulled(lambda w, x: fp8.grouped_for_message(x, w, SIZES, M), weight, x, d_out)
    assert_same_bits(got, want)


@pytest.mark.parametrize("other", [BFLOAT16, recipe("fp8", "free")], ids=["bfloat16", "free"])
def test_other_recipes_read_the_numbers_alone(other):
    """Tiles of another array change nothing; of free scales they would not be the rows."""

    def broken(x):
        return TiledArray(x.array, jax.tree.map(jnp.zeros_like, x.tiles))

    weight, x, d_out = prepared(other, E, K, N), tiled(M, K), tiled(M, N, seed=2)
    want = pulled(lambda w, x: other.grouped(x, w, SIZES, M), weight, x.array, d_out.array)
    given = weight, broken(x), broken(d_out)
    got = pulled(lambda w, x: other.grouped_for_message(x, w, SIZES, M), *given)
    assert_same_bits(got, want)


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_swiglu_as_an_input(limit, fp8):
    weight, gate_up, d_out = prepared(fp8, E, K, N), normal(M, 2 * K), normal(M, N, seed=2)
    scale = normal(M, seed=3, dtype=jnp.float32)

    def of_numbers(w, x):
        return fp8.grouped(swiglu(x, scale, limit=limit), w, SIZES, M)

    def of_input(w, x):
        return fp8.grouped(SwiGLU(x, scale, limit), w, SIZES, M)

    got, want = (pulled(fn, weight, gate_up, d_out) for fn in (of_input, of_numbers))
    assert_same_bits(got, want)


@pytest.mark.parametrize("scale", [None, normal(2, 64, seed=3, dtype=jnp.float32)])
def test_swiglu_and_quantiser_in_one_kernel(scale, monkeypatch):
    """Its rows are those of XLA, and so is the product of them. The result is never read."""
    monkeypatch.setattr(Plain, "operands", None)
    hopper = HopperProducts(sms=1, interpret=interpreted.GPU)
    fused = dataclasses.replace(FP8, kernels=frozenset({QUANTISE}), hopper=hopper)
    weight, gate_up = prepared(FP8, 128, N), normal(2, 64, 256)

    def layer(fp8):
        return jax.jit(lambda x: fp8.einsum("BSF,FD->BSD", SwiGLU(x, scale), weight))

    got, want = interpreted.run(layer(fused), gate_up), layer(FP8)(gate_up)
    assert_same_bits([got], [want])


@pytest.mark.slow  # one by one, the kernels are tested in `test_fp8_hopper_quantise.py`
def test_all_kernels_on_what_messages_bring():
    """Three products of real numbers, to the rounding of sums in float32 to bfloat16."""
    hopper = HopperProducts(sms=1, interpret=interpreted.GPU)
    kernels = dataclasses.replace(FP8, kernels=FP8.known_kernels, hopper=hopper)
    weight, x, d_out = prepared(FP8, E, K, N), tiled(M, K), tiled(M, N, seed=2)
    layer = functools.partial(pulled, lambda w, x: kernels.grouped_for_message(x, w, SIZES, M))
    got = interpreted.run(layer, weight, x, d_out)
    want = pulled(lambda w, x: FP8.grouped(x, w, SIZES, M), weight, x.array, d_out.array)
    for ours, theirs, rounding in zip(got, want, (2**-7, 1e-5, 2**-7), strict=True):
        ours, theirs = (np.asarray(each, np.float32) for each in (ours, theirs))
        least = 1e-6 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=rounding, atol=least)


def test_sources():
    x, gate_up = tiled(8, 256), normal(8, 512)
    found = source_of(x, 256, True)
    assert isinstance(found, FromKept) and found.shape == (8, 256)
    assert source_of(x, 256, False) is None and source_of(x.array, 256, True) is None
    narrow = jax.tree.map(lambda part: part.reshape(2, 4, -1), tiled(8, 100))
    assert source_of(narrow, 400, True) is None  # a tile of 100 columns ends inside 400
    whole = source_of(SwiGLU(gate_up), 256, True)
    assert isinstance(whole, FromSwiGLU) and whole.shape == (8, 256)
    assert source_of(SwiGLU(gate_up.astype(jnp.float32)), 256, True) is None


def test_dtypes():
    wide = TiledArray(jnp.ones((2, 4)), Tiles(jnp.ones((2, 4)), jnp.ones((2, 1))))
    assert numbers(in_dtype(wide, jnp.bfloat16)).dtype == jnp.bfloat16
    kept = SwiGLU(normal(2, 8))
    assert in_dtype(kept, jnp.bfloat16) is kept
    assert in_dtype(kept, jnp.float32).dtype == jnp.float32
