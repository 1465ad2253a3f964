"""FP8 operands of kernel tests whose sums are exact, and their products in float64.

Values are integers from -2 to 2, scales powers of two from 2^-3 to 2^3. Every sum is then a small
multiple of 2^-6, exact in float32 in any order, and exact in tensor cores that keep 14 bits.
"""

import jax.numpy as jnp
import numpy as np

BLOCK = 128


def values(*shape, seed):
    """E4M3 integers."""
    numbers = np.random.default_rng(seed).integers(-2, 3, shape)
    return jnp.asarray(numbers, jnp.float8_e4m3fn)


def scales(*shape, seed):
    """Powers of two."""
    powers = np.random.default_rng(seed).integers(-3, 4, shape)
    return jnp.asarray(2.0**powers, jnp.float32)


def whole(values, scales):
    """values * scales in float64; along an axis there is a scale for each value or each block."""
    scales = np.asarray(scales, np.float64)
    for axis, size in enumerate(values.shape):
        if scales.shape[axis] != size:
            scales = np.repeat(scales, BLOCK, axis)
    return np.asarray(values).astype(np.float64) * scales
