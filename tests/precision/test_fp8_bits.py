"""Every quantiser of the package, bit for bit against NumPy and `ml_dtypes`.

On random, denormal, huge, zero and non-finite tiles. `tests/qwix/quantisers.py` holds the same
quantisers against those of qwix.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from equations import tiles as equations
from hard_tiles import assert_same_bits, broken, hard

from deepseek_jax.checkpoint.hf import fp8_blocks
from deepseek_jax.precision.expert_tiles import quantise_rows
from deepseek_jax.precision.fp8_tiles import quantise_tiles, scales_from
from deepseek_jax.precision.fp8_weights import Linear, quantise_blocks
from deepseek_jax.precision.payload import FP8_PAYLOAD

pytestmark = pytest.mark.usefixtures("strict_dtypes")

both = pytest.mark.parametrize("power_of_two", [False, True], ids=["free", "power of two"])
inputs = pytest.mark.parametrize("make", [hard, broken])
ROWS, WIDTH = 330, 200  # no multiple of 128; rows of each kind in `hard`


def reference(x, axis, starts, ends, power_of_two):
    """Values and scales of tiles of x along `axis`, from each start to its end."""
    x = np.moveaxis(x, axis, -1)
    values, scales = np.zeros(x.shape, equations.E4M3), np.empty((*x.shape[:-1], len(starts)))
    for *row, number in np.ndindex(scales.shape):
        tile = (*row, slice(starts[number], ends[number]))
        pair = equations.quantise_tile(x[tile], power_of_two)
        values[tile], scales[(*row, number)] = pair
    return np.moveaxis(values, -1, axis), np.moveaxis(scales, -1, axis).astype(np.float32)


def steps(size):
    starts = range(0, size, 128)
    return list(starts), [min(start + 128, size) for start in starts]


@both
@inputs
@pytest.mark.parametrize("axis", [-1, -2])
def test_tiles(axis, make, power_of_two):
    x = make(ROWS, WIDTH)
    got = jax.jit(lambda x: quantise_tiles(x, power_of_two=power_of_two, axis=axis))(x)
    want = reference(x, axis, *steps(x.shape[axis]), power_of_two)
    assert_same_bits(got.values, got.scales, *want)


@inputs
def test_rows_that_travel(make):
    x = make(ROWS, WIDTH)
    values, exponents = jax.jit(FP8_PAYLOAD.encode)(x)
    want, scales = reference(x, -1, *steps(WIDTH), True)
    scales = np.where(np.isfinite(scales), scales, np.inf)  # the exponent 255 stands for NaN, too
    assert_same_bits(values, scales_from(exponents), want, scales)


@both
@inputs
def test_tiles_of_each_expert_s_rows(make, power_of_two):
    x, sizes = make(ROWS, 24), np.array([130, 0, 61, 128], np.int32)
    x[sizes.sum() :] = 1e30  # padding: no scale depends on it
    ends = np.cumsum(sizes)
    starts = [s for end, size in zip(ends, sizes, strict=True) for s in range(end - size, end, 128)]
    stops = [min(start + 128, *(end for end in ends if end > start)) for start in starts]
    got = jax.jit(lambda x, sizes: quantise_rows(x, sizes, power_of_two))(x, sizes)
    values, scales = reference(x, -2, starts, stops, power_of_two)
    assert_same_bits(got.values, got.scales[: len(starts)], values, scales)


@both
@inputs
def test_blocks_of_weights(make, power_of_two):
    x = make(2, ROWS, WIDTH)
    linear = Linear.whole("io", x.shape[1:])
    got = jax.jit(lambda x: quantise_blocks(x, linear, power_of_two=power_of_two))(x)
    values, scales = np.empty(x.shape, equations.E4M3), np.empty(got.scales.shape, np.float32)
    for layer, row, column in np.ndindex(scales.shape):
        at = (layer, *(slice(128 * i, 128 * i + 128) for i in (row, column)))
        values[at], scales[layer, row, column] = equations.quantise_tile(x[at], power_of_two)
    assert_same_bits(got.values, got.scales, values, scales)


@both
def test_blocks_of_exports(power_of_two):
    """Their rule: largest / 448, divided; a block of zeros has the scale 1, no block a floor."""
    x = hard(ROWS, WIDTH)
    values, scales = fp8_blocks.quantise_blocks(x, powers_of_two=power_of_two)
    for row, column in np.ndindex(scales.shape):
        at = tuple(slice(128 * i, 128 * i + 128) for i in (row, column))
        largest = np.abs(x[at]).max()
        scale = largest / np.float32(448) if largest else np.float32(1)
        if power_of_two and largest:
            scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(largest) / 448)))
        assert scales[row, column] == scale
        want = np.clip(x[at] / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        assert_same_bits(values[at], scale, want, scale)


@both
def test_an_array_of_bfloat16_is_quantised_in_float32(power_of_two):
    x = hard(ROWS, WIDTH).astype(ml_dtypes.bfloat16)
    got = quantise_tiles(jnp.asarray(x), power_of_two=power_of_two)
    want = reference(x.astype(np.float32), -1, *steps(WIDTH), power_of_two)
    assert_same_bits(got.values, got.scales, *want)
