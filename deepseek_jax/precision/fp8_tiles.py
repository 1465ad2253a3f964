"""FP8 tiles: 1x128 values in E4M3 with one scale each (section 3.3.2 of the report).

The tile runs along the last axis, the one that a matmul contracts, so that the scale of a token's
128 channels follows that token alone, and is made of the present values, not of a history.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 128  # values along an axis that share a scale; the last ones may be fewer
E4M3 = np.dtype(jnp.float8_e4m3fn)
LARGEST = 448.0  # of E4M3; a cast makes NaN of what is far above
FLOOR = 1e-12  # of a tile's largest magnitude, so that zeros have a scale
# XLA makes products of divisions by a constant or by what is broadcast, but not everywhere. They
# are written as products here, so that every backend and NumPy agree to the bit.
_PER_LARGEST = np.float32(1 / LARGEST)

Array = TypeVar("Array", np.ndarray, jax.Array)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Stands for values * scales, each scale over its tile.

    Attributes:
      values: (..., D) float8_e4m3fn.
      scales: (..., ceil(D / 128)) float32, above zero.
    """

    values: jax.Array
    scales: jax.Array


def quantise_tiles(x: jax.Array, *, power_of_two: bool) -> Tiles:
    """The tiles nearest to x: at worst 2^-4 of a value or 2^-10 of its scale off.

    Args:
      x: (..., D), any float dtype, below 2^127 in magnitude. A NaN or an infinity makes NaN of its
        whole tile.
      power_of_two: rounds scales up to the next power of two; then `dequantise` is exact in
        bfloat16, and quantising that again, with other tiles too, loses only what underflows.
    """
    x = x.astype(jnp.float32)
    width = x.shape[-1]
    padded = jnp.pad(jnp.abs(x), [(0, 0)] * (x.ndim - 1) + [(0, -width % BLOCK)])
    largest = padded.reshape(*x.shape[:-1], -1, BLOCK).max(-1)  # ...D -> ...(D/128)128
    scales = jnp.maximum(largest, FLOOR) * _PER_LARGEST
    if power_of_two:
        scales = _next_power_of_two(scales)
    scaled = jnp.clip(x * spread(1 / scales, x.shape), -LARGEST, LARGEST)
    return Tiles(scaled.astype(E4M3), scales)


def dequantise_tiles(tiles: Tiles, dtype: jax.typing.DTypeLike) -> jax.Array:
    """values * scales in float32, then rounded once to `dtype`."""
    values = tiles.values.astype(jnp.float32)
    return (values * spread(tiles.scales, values.shape)).astype(dtype)


def spread(scales: Array, shape: tuple[int, ...]) -> Array:
    """One scale per value: of tiles, (..., D/128), or of 128x128 blocks, for values of `shape`."""
    for axis, size in enumerate(shape):
        if scales.shape[axis] != size:
            scales = scales.repeat(BLOCK, axis)
    return scales[tuple(map(slice, shape))]


def _next_power_of_two(x: jax.Array) -> jax.Array:
    """The least power of two that is not below x > 0, by its bits: exp2 and log2 are inexact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits + 0x007FFFFF) & 0x7F800000
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(exponent, jnp.float32), x)
