"""Several arrays of the same rows as one array of 32-bit words, so that they travel as one message.

Each field is padded to whole words. Bits are moved, never converted.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
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
