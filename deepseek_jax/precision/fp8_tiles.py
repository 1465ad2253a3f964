"""FP8 tiles: 1x128 values in E4M3 under one scale (section 3.3.2 of the report).

A tile runs along the axis that a matmul contracts: 128 channels of one token share a scale.
The scale follows from the present values (online quantisation), not from a history of maxima.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from deepseek_jax.precision.rounding import rounded

BLOCK = 128  # values along an axis that share a scale; the last tile may be shorter
E4M3 = np.dtype(jnp.float8_e4m3fn)  # the dtype; the package's one definition of it
LARGEST = 448.0  # largest E4M3 value; a cast makes NaN of values far above it
FLOOR = 1e-12  # least magnitude that a scale is made of, so that tiles of zeros have a scale
# No division here: on a GPU it is approximate, and some backends rewrite it as a product. With
# power-of-two scales only products, whose rounding IEEE 754 fixes, and bits remain, so that results
# agree with NumPy to the bit (run on a CPU, compiled for a GPU). Other scales need a reciprocal:
# on a GPU their values may differ in the last bit.
_PER_LARGEST = np.float32(1 / LARGEST)
_MANTISSA_BITS = np.uint32(23)  # of a float32

Array = TypeVar("Array", np.ndarray, jax.Array)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """An array values * scales, each scale over its tile.

    Attributes:
      values: float8_e4m3fn, of any shape.
      scales: float32, above zero; ceil(size / 128) along the axis of the tiles, like `values` along
        the others.
    """

    values: jax.Array
    scales: jax.Array


def quantise_tiles(x: jax.Array, *, power_of_two: bool, axis: int = -1) -> Tiles:
    """Tiles nearest to x; the error is at most 2^-4 of a value or 2^-10 of its scale.

    A tile of zeros has the scale of the floor, and values of zero; magnitudes below 2^-10 of a
    scale become zero.

    Args:
      x: any float dtype, below 2^127 in magnitude. A NaN or an infinity makes its whole tile NaN.
      power_of_two: whether to round scales up to the next power of two. `dequantise_tiles` is then
        exact in bfloat16, and quantising its result again, along another axis too, loses only
        values that underflow.
      axis: that the tiles run along: -1 for 128 channels of one token, -2 for one channel of 128
        tokens, as the gradient of a weight contracts them.
    """
    x = x.astype(jnp.float32)
    scales = scales_of(largest_of_tiles(jnp.abs(x), axis), power_of_two)
    return Tiles(quantised(x, spread(scales, x.shape), power_of_two), scales)


def largest_of_tiles(x: jax.Array, axis: int) -> jax.Array:
    """Largest value of each tile of x >= 0 along `axis`; NaN if there is one."""
    axis %= x.ndim
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % BLOCK)
    padded = jnp.pad(as_integers(x), padding)
    tiles = (*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :])
    return as_floats(padded.reshape(tiles).max(axis + 1))


def as_integers(x: jax.Array) -> jax.Array:
    """The bits of float32 x >= 0 as int32 in the order of x, NaN above infinity.

    XLA for CPUs drops NaN from a maximum of 4,096 or more floats (jax 0.10.2 and 0.12), as its
    library YNNPACK does; a maximum of integers keeps it, and does not take denormals for zero.
    """
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def as_floats(bits: jax.Array) -> jax.Array:
    """Inverse of `as_integers`."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def scales_of(largest: jax.Array, power_of_two: bool) -> jax.Array:
    """Scales of tiles or blocks with these largest magnitudes, float32."""
    scales = jnp.maximum(largest, FLOOR) * _PER_LARGEST
    return _next_power_of_two(scales) if power_of_two else scales


def quantised(x: jax.Array, scales: jax.Array, power_of_two: bool) -> jax.Array:
    """Values x / scales in E4M3, for float32 x and scales of its shape."""
    inverse = inverse_power_of_two(scales) if power_of_two else 1 / scales
    return rounded(jnp.clip(x * inverse, -LARGEST, LARGEST), E4M3)


def dequantise_tiles(tiles: Tiles, dtype: DTypeLike) -> jax.Array:
    """Product values * scales in float32, rounded once to `dtype`."""
    values = tiles.values.astype(jnp.float32)
    return (values * spread(tiles.scales, values.shape)).astype(dtype)


def exponents(scales: jax.Array) -> jax.Array:
    """Power-of-two scales as uint8, one byte each: their biased exponents (E8M0 of OCP MX).

    A scale that is not finite has 255.
    """
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint32)
    return (bits >> _MANTISSA_BITS).astype(jnp.uint8)


def scales_from(exponents: jax.Array) -> jax.Array:
    """Inverse of `exponents`, float32; 255 becomes infinity, whose products with NaN are NaN."""
    bits = exponents.astype(jnp.uint32) << _MANTISSA_BITS
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def spread(scales: Array, shape: tuple[int, ...]) -> Array:
    """Scales of tiles, (..., D/128), or of 128x128 blocks, repeated to `shape`: one per value."""
    for axis, size in enumerate(shape):
        if scales.shape[axis] != size:
            scales = scales.repeat(BLOCK, axis)
    return scales[tuple(map(slice, shape))]


def _next_power_of_two(x: jax.Array) -> jax.Array:
    """Least power of two >= x > 0, from the bits of x, because exp2 and log2 are inexact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits + 0x007FFFFF) & 0x7F800000
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(exponent, jnp.float32), x)


def inverse_power_of_two(x: jax.Array) -> jax.Array:
    """Reciprocals of powers of two below 2^127, from their bits; NaN where x is not finite."""
    bits = np.int32(0x7F000000) - jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(bits, jnp.float32), jnp.nan)
