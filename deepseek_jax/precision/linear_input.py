"""Inputs of linear layers of which more is known than their numbers.

    TiledArray    an array, and FP8 tiles that hold it: those of a message, or of a residual
    SwiGLU        an activation of gate and up

Recipes take them where they take an array. FP8 multiplies tiles as they are, and computes SwiGLU
while it quantises the result; other recipes take the numbers. Gradients are those of the numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.precision.fp8_tiles import BLOCK, E4M3, Tiles
from deepseek_jax.precision.swiglu import swiglu


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledArray:
    """An array, and FP8 tiles of the same numbers.

    Attributes:
      array: ...D.
      tiles: along D, with power-of-two scales.
    """

    array: jax.Array
    tiles: Tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """The numbers `swiglu(gate_up, scale)`, clamped to `limit`.

    Attributes:
      gate_up: ...(2F), gate first.
      scale: ... float32; None for 1.
      limit: as for `swiglu`; 0 for none.
    """

    gate_up: jax.Array | TiledArray
    scale: jax.Array | None = None
    limit: float = dataclasses.field(default=0.0, metadata={"static": True})


LinearInput = jax.Array | TiledArray | SwiGLU


def numbers(x: LinearInput) -> jax.Array:
    """The array that an input stands for."""
    if isinstance(x, SwiGLU):
        return swiglu(numbers(x.gate_up), x.scale, limit=x.limit)
    return x.array if isinstance(x, TiledArray) else x


def with_tiled_gradient(out: jax.Array) -> TiledArray:
    """An output MD whose gradient is a `TiledArray`; its own tiles are zeros that nothing reads."""
    blocks = -(-out.shape[1] // BLOCK)
    values, scales = jnp.zeros(out.shape, E4M3), jnp.zeros((out.shape[0], blocks), jnp.float32)
    return TiledArray(out, Tiles(values, scales))


def empty_like(x: jax.Array) -> jax.Array:
    """No numbers, of the dtype of x: a residual that says no more."""
    return jnp.zeros((0,), x.dtype)


def in_dtype(x: LinearInput, dtype: DTypeLike) -> LinearInput:
    """The input with numbers of this dtype."""
    if isinstance(x, TiledArray):
        return TiledArray(x.array.astype(dtype), x.tiles)
    if isinstance(x, SwiGLU) and numbers(x.gate_up).dtype == dtype:
        return x
    return numbers(x).astype(dtype)
