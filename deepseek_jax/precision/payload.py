"""What tokens travel as: BF16 or FP8 to their experts, BF16 home (sections 3.2.2 and 3.3.2).

FP8 is E4M3 in tiles of 1x128 with power-of-two scales, sent beside their scales. Gradients travel
the mirrored way: into the experts' outputs like tokens, home from their inputs like outputs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.precision import fp8_tiles


@dataclasses.dataclass(frozen=True)
class Payload:
    """Attributes:
    fp8: whether rows travel to the experts as E4M3 tiles; otherwise as they are.
    """

    fp8: bool

    def encode(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Rows RD -> what is sent of them, arrays R..."""
        if not self.fp8:
            return (x,)
        tiles = fp8_tiles.quantise_tiles(x.astype(jnp.float32), power_of_two=True)
        return tiles.values, tiles.scales

    def decode(self, sent: tuple[jax.Array, ...], dtype: Any) -> jax.Array:
        """The rows again, RD in the dtype they had; the scales lose nothing even in bfloat16."""
        return fp8_tiles.dequantise_tiles(fp8_tiles.Tiles(*sent), dtype) if self.fp8 else sent[0]

    def bytes_out(self, width: int, dtype: Any) -> tuple[int, ...]:
        """Bytes of a row of `width` numbers on its way to an expert, in each array of `encode`."""
        if not self.fp8:
            return (width * jnp.dtype(dtype).itemsize,)
        return width, 4 * -(-width // fp8_tiles.BLOCK)


UNCHANGED_PAYLOAD, FP8_PAYLOAD = Payload(fp8=False), Payload(fp8=True)
