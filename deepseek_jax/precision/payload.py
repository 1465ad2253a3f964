"""Encoding of rows in messages: tokens go to their experts in BF16 or FP8, outputs return in BF16.

FP8 (sections 3.2.2 and 3.3.3) is E4M3 in tiles of 1x128, sent beside power-of-two scales, each as
one byte, its exponent. Backward mirrors this: gradients of the experts' outputs are dispatched in
the payload of tokens, gradients of their inputs return in that of outputs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.precision import fp8_tiles


@dataclasses.dataclass(frozen=True)
class Payload:
    """Encoding of rows.

    Attributes:
      fp8: whether rows are encoded as E4M3 tiles; otherwise they stay as they are.
    """

    fp8: bool

    def encode(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Rows RD -> the arrays R... that are sent."""
        if not self.fp8:
            return (x,)
        tiles = fp8_tiles.quantise_tiles(x.astype(jnp.float32), power_of_two=True)
        return tiles.values, fp8_tiles.exponents(tiles.scales)

    def decode(self, sent: tuple[jax.Array, ...], dtype: DTypeLike) -> jax.Array:
        """Encoded rows -> RD in `dtype`; power-of-two scales make this exact, even in bfloat16."""
        if not self.fp8:
            return sent[0]
        values, exponents = sent
        tiles = fp8_tiles.Tiles(values, fp8_tiles.scales_from(exponents))
        return fp8_tiles.dequantise_tiles(tiles, dtype)

    def bytes_out(self, width: int, dtype: DTypeLike) -> tuple[int, ...]:
        """Bytes of an encoded row of `width` numbers, for each array of `encode`."""
        if not self.fp8:
            return (width * jnp.dtype(dtype).itemsize,)
        return width, -(-width // fp8_tiles.BLOCK)


UNCHANGED_PAYLOAD, FP8_PAYLOAD = Payload(fp8=False), Payload(fp8=True)
