"""Packing of several arrays of the same rows into one array of 32-bit words, sent as one message.

Each field is padded to whole words, and its bits are moved, never converted. A GPU gathers words
several times faster than single bytes, so rows stay packed from hop to hop and are summed as words.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Field:
    """Shape and dtype of one packed array: R rows of `shape`, in `dtype`."""

    shape: tuple[int, ...]
    dtype: jnp.dtype

    @staticmethod
    def of(x: jax.Array) -> "Field":
        """Field of an array R...."""
        return Field(x.shape[1:], jnp.dtype(x.dtype))

    @property
    def words(self) -> int:
        """Words per row."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // WORD_BYTES)


def pack(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays R... of any dtypes of 1, 2 or 4 bytes -> RW uint32."""
    return jnp.concatenate([_words(x) for x in arrays], axis=1)


def unpack(words: jax.Array, fields: Sequence[Field]) -> list[jax.Array]:
    """Inverse of `pack`: RW uint32 -> arrays R..., one for each field."""
    out, start = [], 0
    for field in fields:
        part = words[:, start : start + field.words]
        out.append(_array(part, field))
        start += field.words
    return out


def numbers(words: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """Values of packed rows RW as float32: an array RW, or two for the halves of bfloat16 words."""
    if dtype == jnp.float32:
        return (lax.bitcast_convert_type(words, dtype),)
    if dtype != jnp.bfloat16:
        raise ValueError(f"rows of {dtype} are not summed as words; expected float32 or bfloat16")
    halves = words << _HALF, words & _UPPER  # a bfloat16 is the upper half of a float32
    return tuple(lax.bitcast_convert_type(half, jnp.float32) for half in halves)


def of_numbers(parts: tuple[jax.Array, ...], dtype: jnp.dtype) -> jax.Array:
    """Inverse of `numbers`: RW uint32, the values rounded to `dtype`."""
    bits = _BITS[dtype.itemsize]
    lower, *upper = (
        lax.bitcast_convert_type(part.astype(dtype), bits).astype(jnp.uint32) for part in parts
    )
    return lower | (upper[0] << _HALF) if upper else lower


_HALF, _UPPER = np.uint32(16), np.uint32(0xFFFF0000)

# Unsigned, because a backend may widen bfloat16 to move it, which does not keep every bit pattern.
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _words(x: jax.Array) -> jax.Array:
    field, size = Field.of(x), x.dtype.itemsize
    bits = lax.bitcast_convert_type(x, _BITS[size]).reshape(x.shape[0], -1)
    if size == WORD_BYTES:
        return bits
    per_word = WORD_BYTES // size
    bits = jnp.pad(bits, ((0, 0), (0, field.words * per_word - bits.shape[1])))
    return lax.bitcast_convert_type(bits.reshape(-1, field.words, per_word), jnp.uint32)


def _array(words: jax.Array, field: Field) -> jax.Array:
    bits = lax.bitcast_convert_type(words, _BITS[field.dtype.itemsize])
    bits = bits.reshape(words.shape[0], -1)[:, : math.prod(field.shape)]
    return lax.bitcast_convert_type(bits.reshape(words.shape[0], *field.shape), field.dtype)
