"""Encoding of rows in messages: tokens go to their experts in BF16 or FP8, outputs return in BF16.

FP8 (sections 3.2.2 and 3.3.3) is E4M3 in tiles of 1x128, sent beside power-of-two scales, each as
one byte, its exponent. Backward mirrors this: gradients of the experts' outputs are dispatched in
the payload of tokens, gradients of their inputs return in that of outputs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.precision import fp8_operands, fp8_tiles
from deepseek_jax.precision.fp8_form import PORTABLE, Fp8Form
from deepseek_jax.precision.linear_input import TiledArray, numbers


@dataclasses.dataclass(frozen=True)
class Payload:
    """Encoding of rows.

    Attributes:
      fp8: whether rows are encoded as E4M3 tiles; otherwise they stay as they are.
      form: what makes the tiles, with power-of-two scales.
    """

    fp8: bool
    form: Fp8Form = PORTABLE

    def encode(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Rows RD -> the arrays R... that are sent."""
        if not self.fp8:
            return (x,)
        tiles = fp8_operands.rows(x, self.form)
        return tiles.values, fp8_tiles.exponents(tiles.scales)

    def decode(self, sent: tuple[jax.Array, ...], dtype: DTypeLike) -> jax.Array:
        """Encoded rows -> RD in `dtype`; power-of-two scales make this exact, even in bfloat16."""
        if not self.fp8:
            return sent[0]
        return fp8_tiles.dequantise_tiles(_tiles(sent), dtype)

    def received(self, sent: tuple[jax.Array, ...], dtype: DTypeLike) -> jax.Array | TiledArray:
        """Encoded rows -> the numbers RD of `decode`, with the tiles that they are encoded in."""
        array = self.decode(sent, dtype)
        return TiledArray(array, _tiles(sent)) if self.fp8 else array

    def gradient(
        self, sent: tuple[jax.Array, ...], like: jax.Array | TiledArray
    ) -> jax.Array | TiledArray:
        """Encoded rows as the gradient of an array, or of a `TiledArray`.

        Args:
          like: of the structure and dtype of what it is the gradient of.
        """
        decode = self.received if isinstance(like, TiledArray) else self.decode
        return decode(sent, numbers(like).dtype)

    def bytes_out(self, width: int, dtype: DTypeLike) -> tuple[int, ...]:
        """Bytes of an encoded row of `width` numbers, for each array of `encode`."""
        if not self.fp8:
            return (width * jnp.dtype(dtype).itemsize,)
        return width, -(-width // fp8_tiles.BLOCK)


def _tiles(sent: tuple[jax.Array, ...]) -> fp8_tiles.Tiles:
    values, exponents = sent
    return fp8_tiles.Tiles(values, fp8_tiles.scales_from(exponents))


UNCHANGED_PAYLOAD, FP8_PAYLOAD = Payload(fp8=False), Payload(fp8=True)
