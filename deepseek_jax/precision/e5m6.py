"""E5M6: 12 bits for each number, in which attention's output waits for backward (section 3.3.3).

A sign, 5 bits of exponent and 6 of mantissa: a float16 without its last 4 bits. 128 numbers share
a power-of-two scale that brings their largest magnitude to 2^14, ..., 2^15. The report gives no
order of the bits; here 8 of them are a byte, and the other 4 share a byte with those of the number
half a row further.

D columns of a row, at least 2 and even.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.precision import fp8_tiles

_LARGEST = 14  # exponent of the largest magnitude of a tile
_LAST = 4  # bits of a float16 that are left out

Packed = tuple[jax.Array, jax.Array, jax.Array]


def encode(x: jax.Array) -> Packed:
    """The nearest E5M6 numbers, to 2^-7 of a value or 2^-34 of the largest one of its tile.

    Args:
      x: ...D bfloat16. A NaN or an infinity makes its whole tile NaN.

    Returns:
      The first bytes ...D uint8, the other bits ...(D/2) uint8, exponents of the scales ...(D/128).
    """
    wide = x.astype(jnp.float32)
    largest = fp8_tiles.largest_of_tiles(jnp.abs(wide), -1)
    scales = _scales(jnp.maximum(largest, fp8_tiles.FLOOR))
    inverse = fp8_tiles.spread(fp8_tiles.inverse_power_of_two(scales), x.shape)
    # A bfloat16's mantissa fits into a float16: this cast rounds subnormal numbers alone.
    bits = jax.lax.bitcast_convert_type((wide * inverse).astype(jnp.float16), jnp.uint16)
    odd = (bits >> _LAST) & jnp.uint16(1)
    twelve = (bits + jnp.uint16(2 ** (_LAST - 1) - 1) + odd) >> _LAST  # to nearest, ties to even
    first, second = jnp.split((twelve & jnp.uint16(15)).astype(jnp.uint8), 2, axis=-1)
    high = (twelve >> _LAST).astype(jnp.uint8)
    return high, first | (second << 4), fp8_tiles.exponents(scales)


def decode(packed: Packed, dtype: DTypeLike) -> jax.Array:
    """Inverse of `encode`, ...D; exact in bfloat16 and in wider types."""
    high, low, exponents = packed
    last = jnp.concatenate([low & jnp.uint8(15), low >> 4], axis=-1).astype(jnp.uint16)
    twelve = (high.astype(jnp.uint16) << _LAST) | last
    halves = jax.lax.bitcast_convert_type(twelve << _LAST, jnp.float16)
    scales = fp8_tiles.spread(fp8_tiles.scales_from(exponents), high.shape)
    return (halves.astype(jnp.float32) * scales).astype(dtype)


def _scales(largest: jax.Array) -> jax.Array:
    """Powers of two, float32: largest / scale is at least 2^14 and below 2^15."""
    exponent = fp8_tiles.as_integers(largest) & jnp.int32(0x7F800000)
    return fp8_tiles.as_floats(exponent) * jnp.float32(2.0**-_LARGEST)
