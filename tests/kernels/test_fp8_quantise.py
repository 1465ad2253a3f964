"""The kernel that quantises rows, in JAX's interpreter, against the portable form: every bit."""

import functools

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.kernels import fp8_quantise
from deepseek_jax.precision.fp8_tiles import FLOOR, LARGEST, quantise_tiles

pytestmark = pytest.mark.usefixtures("strict_dtypes")

kernel = functools.partial(
    fp8_quantise.quantise, largest=LARGEST, floor=FLOOR, interpret=interpreted.GPU
)


def hard_rows():
    """128 x 256: magnitudes over the range of bfloat16, zeros, ties, infinities.

    No NaN: XLA for CPUs loses one in the maximum that the interpreter takes of a large array. On a
    GPU the kernel's maximum keeps it (`tests/aot/test_fp8_kernels.py`).
    """
    random = np.random.default_rng(0)
    x = random.normal(size=(128, 256)) * 2.0 ** random.integers(-140, 126, (128, 1))
    x[0] = 0
    x[1] = 1e-30
    x[2] = 448 * 2.0 ** random.integers(-9, 9, 256)  # largest values that are powers of two x 448
    x[3] = random.integers(-448, 449, 256)
    x[4, 200], x[5, 0] = np.inf, -np.inf
    return jnp.asarray(x, jnp.bfloat16)


def test_tiles_are_those_of_the_portable_form():
    x = hard_rows()
    values, scales = interpreted.run(jax.jit(kernel), x)
    want = quantise_tiles(x, power_of_two=True)
    np.testing.assert_array_equal(scales.T, want.scales)
    # As bits, but for the sign of a NaN.
    bits, want_bits = (np.asarray(part).view(np.uint8) for part in (values, want.values))
    nan = (want_bits & 0x7F) == 0x7F
    np.testing.assert_array_equal((bits & 0x7F)[nan], 0x7F)
    np.testing.assert_array_equal(bits[~nan], want_bits[~nan])
    assert nan.sum() == 2 * 128  # the tiles with an infinity
    # The scale of the floor is 2^-48, and E4M3 rounds what is below 2^-10 of a scale to zero.
    magnitude = np.abs(np.asarray(x, np.float64)).max(1)
    zero = ((bits & 0x7F) == 0).all(1)
    np.testing.assert_array_equal(zero, magnitude < 2.0**-58)
    assert 0 < zero.sum() < 64


def test_rows_that_do_not_fill_squares():
    with pytest.raises(ValueError, match=r"96 x 128 is not in squares of 64 x 128; pad it"):
        kernel(jnp.zeros((96, 128), jnp.bfloat16))
