"""Several arrays of the same rows as one array of 32-bit words, so that they travel as one message.

Each field is padded to whole words. Bits are moved, never converted. A GPU gathers words several
times as fast as the bytes in them, so rows stay words from hop to hop, and are summed as words.
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
    """What one array looks like: R followed by `shape`, of `dtype`."""

    shape: tuple[int, ...]
    dtype: jnp.dtype

    @staticmethod
    def of(x: jax.Array) -> "Field":
        return Field(x.shape[1:], jnp.dtype(x.dtype))

    @property
    def words(self) -> int:
        return -(-math.prod(self.shape) * self.dtype.itemsize // WORD_BYTES)


def pack(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays R... of any dtypes of 1, 2 or 4 bytes -> RW uint32."""
    return jnp.concatenate([_words(x) for x in arrays], axis=1)


def unpack(words: jax.Array, fields: Sequence[Field]) -> list[jax.Array]:
    """The arrays again, from RW uint32."""
    out, start = [], 0
    for field in fields:
        part = words[:, start : start + field.words]
        out.append(_array(part, field))
        start += field.words
    return out


def numbers(words: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """The numbers of RW words, each place of a word apart: float32 RW, one of them or a pair."""
    if dtype == jnp.float32:
        return (lax.bitcast_convert_type(words, dtype),)
    if dtype != jnp.bfloat16:
        raise ValueError(f"rows of {dtype} are not summed as words; expected float32 or bfloat16")
    halves = words << _HALF, words & _UPPER  # a bfloat16 is the upper half of a float32
    return tuple(lax.bitcast_convert_type(half, jnp.float32) for half in halves)


def of_numbers(parts: tuple[jax.Array, ...], dtype: jnp.dtype) -> jax.Array:
    """Back from `numbers`, rounded to `dtype`."""
    bits = _BITS[dtype.itemsize]
    lower, *upper = (
        lax.bitcast_convert_type(part.astype(dtype), bits).astype(jnp.uint32) for part in parts
    )
    return lower | (upper[0] << _HALF) if upper else lower


_HALF, _UPPER = np.uint32(16), np.uint32(0xFFFF0000)

# Bits that go through arithmetic types do not all survive: a backend may widen bfloat16 to move it.
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
