"""FP8 tiles: bits of the reference, error within that of E4M3, and special values."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from equations import tiles as equations
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.precision import fp8_tiles

pytestmark = pytest.mark.usefixtures("strict_dtypes")

both = pytest.mark.parametrize("power_of_two", [False, True], ids=["float32", "power of two"])
quantise = jax.jit(fp8_tiles.quantise_tiles, static_argnames="power_of_two")
dequantise = jax.jit(fp8_tiles.dequantise_tiles, static_argnames="dtype")
assert_same = functools.partial(jax.tree.map, np.testing.assert_array_equal)

# Magnitudes over most of float32, a tile apart from the next by its own power of ten.
SPREAD = [-30, -13, -12, -11, -6, 0, 5, 30, 37]


def spread_out(*shape, seed=0):
    """Normal float32, every row of another magnitude and with a few values far below it."""
    random = np.random.default_rng(seed)
    x = random.normal(size=shape) * 10.0 ** random.choice(SPREAD, (*shape[:-1], 1))
    return (x * 10.0 ** random.choice([0, 0, 0, -1, -3, -9], shape)).astype(np.float32)


def assert_same_bits(tiles, want):
    values, scales = want
    assert tiles.values.dtype == jnp.float8_e4m3fn and tiles.scales.dtype == jnp.float32
    np.testing.assert_array_equal(
        np.asarray(tiles.values).view(np.uint8), values.view(np.uint8)
    )  # the sign of a zero too
    np.testing.assert_array_equal(tiles.scales, scales)


@both
@pytest.mark.parametrize("run", [quantise, fp8_tiles.quantise_tiles], ids=["compiled", "op by op"])
@pytest.mark.parametrize("shape", [(300, 256), (40, 3, 200), (64, 8), (64, 20), (50, 128), (1,)])
def test_bits_of_the_reference(shape, run, power_of_two):
    x = spread_out(*shape)
    tiles = run(jnp.asarray(x), power_of_two=power_of_two)
    assert_same_bits(tiles, equations.quantise(x, power_of_two))
    np.testing.assert_allclose(  # float64, then one rounding
        dequantise(tiles, dtype="float32"),
        equations.dequantise(*equations.quantise(x, power_of_two)),
        rtol=2**-24,
    )


@both
def test_every_rounding_of_e4m3(power_of_two):
    """All 253 numbers, what lies halfway between neighbours, and either side of that."""
    grid = np.unique(
        np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )
    grid = grid[np.isfinite(grid)]
    half = (grid[1:] + grid[:-1]) / 2
    points = np.concatenate([grid, half, np.nextafter(half, -np.inf), np.nextafter(half, np.inf)])
    points = np.append(points, np.zeros(-len(points) % 127, np.float32)).reshape(-1, 127)
    x = np.concatenate([points, np.full_like(points[:, :1], 448)], axis=1)  # so the scale is 1
    tiles = quantise(jnp.asarray(x), power_of_two=power_of_two)
    np.testing.assert_array_equal(tiles.scales, 1)
    assert_same_bits(tiles, equations.quantise(x, power_of_two))


@both
def test_bfloat16_is_quantised_as_the_float32_that_it_is(power_of_two):
    x = jnp.asarray(spread_out(20, 200)).astype(jnp.bfloat16)
    tiles = quantise(x, power_of_two=power_of_two)
    assert_same(tiles, quantise(x.astype(jnp.float32), power_of_two=power_of_two))


@both
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), width=st.sampled_from([8, 20, 128, 200, 384]))
def test_no_value_is_further_off_than_half_a_step(width, seed, power_of_two):
    x = spread_out(6, width, seed=seed)
    tiles = quantise(jnp.asarray(x), power_of_two=power_of_two)
    values, scales = np.asarray(tiles.values), np.asarray(tiles.scales)
    off = np.abs(equations.dequantise(values, scales) - x)
    step = np.repeat(scales, 128, -1)[:, :width] * 2.0**-9  # between subnormals
    # Scales that are no power of two are rounded, as is their reciprocal: 2^-22 at most.
    rounding = 0 if power_of_two else 2**-22 * np.abs(x)
    assert np.all(off <= np.maximum(2**-4 * np.abs(x), step / 2) + rounding)


@both
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), width=st.sampled_from([8, 20, 128, 200, 384]))
def test_quantising_again_changes_nothing(width, seed, power_of_two):
    once = quantise(jnp.asarray(spread_out(6, width, seed=seed)), power_of_two=power_of_two)
    plain = dequantise(once, dtype="float32")
    twice = quantise(plain, power_of_two=power_of_two)
    if power_of_two:  # a largest value of 225 became 224, which half the scale holds as well
        assert_same(dequantise(twice, dtype="float32"), plain)
    else:
        assert_same(twice.values, once.values)
        np.testing.assert_allclose(twice.scales, once.scales, rtol=2**-22)  # two roundings


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_powers_of_two_survive_other_tiles_and_bfloat16(seed):
    """The backward pass cuts what the forward pass kept into tiles along the tokens."""
    x = np.random.default_rng(seed).normal(size=(256, 200)).astype(np.float32)
    tiles = quantise(jnp.asarray(x), power_of_two=True)
    kept = dequantise(tiles, dtype="bfloat16")
    assert_same(kept.astype(jnp.float32), dequantise(tiles, dtype="float32"))
    other = quantise(kept.T, power_of_two=True)
    back = np.asarray(dequantise(other, dtype="float32").T)
    underflow = np.repeat(other.scales, 128, -1).T * 2.0**-6  # smallest with all its bits
    large = np.abs(kept.astype(jnp.float32)) >= underflow
    assert large.mean() > 0.95
    np.testing.assert_array_equal(back[large], np.asarray(kept.astype(jnp.float32))[large])


def test_float32_scales_do_not_survive_bfloat16():
    """The reason for powers of two."""
    tiles = quantise(jnp.asarray(spread_out(20, 128)), power_of_two=False)
    rounded = dequantise(tiles, dtype="bfloat16").astype(jnp.float32)
    assert np.any(rounded != dequantise(tiles, dtype="float32"))


def test_exact_powers_stay_and_all_else_goes_up():
    powers = np.ldexp(np.float32(1), np.arange(-47, 118))
    below, above = np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf))
    for largest, scale in [(powers, powers), (below, powers), (above, 2 * powers)]:
        tiles = quantise(jnp.asarray(448 * largest)[:, None], power_of_two=True)
        np.testing.assert_array_equal(tiles.scales[:, 0], scale)


@both
def test_a_scale_is_the_largest_over_448(power_of_two):
    x = spread_out(200, 128)
    exact = np.maximum(np.abs(x).max(-1), np.float32(1e-12)) / 448.0
    scales = np.asarray(quantise(jnp.asarray(x), power_of_two=power_of_two).scales)[:, 0]
    if power_of_two:
        assert np.all((scales >= exact) & (scales < 2 * exact))
        assert np.all(np.frexp(scales)[0] == 0.5)
    else:
        np.testing.assert_allclose(scales, exact, rtol=2**-23)


@both
def test_a_tile_of_zeros_is_zeros_and_a_tile_s_scale_is_its_own(power_of_two):
    x = np.zeros((3, 300), np.float32)
    x[1, 128:256] = 3.0
    tiles = quantise(jnp.asarray(x), power_of_two=power_of_two)
    assert tiles.scales.shape == (3, 3) and np.all(np.asarray(tiles.scales) > 0)
    np.testing.assert_array_equal(tiles.scales[1, 0], tiles.scales[0, 0])
    np.testing.assert_allclose(dequantise(tiles, dtype="float32"), x, rtol=2**-22)


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_nan_in_its_tile_and_nowhere_else(bad, power_of_two):
    x = np.ones((2, 256), np.float32)
    x[0, 130] = bad
    out = np.asarray(
        dequantise(quantise(jnp.asarray(x), power_of_two=power_of_two), dtype="float32")
    )
    assert np.isnan(out[0, 128:]).all()
    assert np.isfinite(out[0, :128]).all() and np.isfinite(out[1]).all()


@both
def test_the_largest_inputs_stay_finite(power_of_two):
    x = np.array([[np.nextafter(np.float32(2**127), np.float32(0)), -1e38, 1e30, 0]], np.float32)
    for dtype in ("float32", "bfloat16"):
        out = dequantise(quantise(jnp.asarray(x), power_of_two=power_of_two), dtype=dtype)
        np.testing.assert_allclose(out.astype(jnp.float32)[0, :2], x[0, :2], rtol=2**-4)
        assert np.isfinite(out.astype(jnp.float32)).all()


def test_power_of_two_scales_need_no_division():
    """On a GPU a division is approximate; every backend has the same products and bits."""
    x = jnp.asarray(spread_out(4, 256))
    used = {
        power_of_two: str(jax.make_jaxpr(lambda x, p=power_of_two: quantise(x, power_of_two=p))(x))
        for power_of_two in (False, True)
    }
    assert " div " in used[False] and " div " not in used[True]
