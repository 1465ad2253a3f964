"""FP8 tiles and weights by the quantisers for Hopper, on the types of the portable form.

M rows, D columns, T tiles of an expert's tokens, E experts.

A quantiser reads one of the sources of `fp8_sources.py` once, and returns tiles of 128 columns, of
128 tokens, or both: those of `fp8_tiles.quantise_tiles` and `token_tiles.quantise_tokens` of
`source.portable()`, bit for bit, but that a tile of NaN is NaN in its padding, too. Scales are
powers of two. Free scales need a division, which XLA and a kernel may round differently on a GPU:
they stay portable, as does what does not fit (`TileSource.fits`, `takes_weight`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.kernels import fp8_quantise, fp8_quantise_blocks
from deepseek_jax.precision.fp8_sources import TileSource, padded
from deepseek_jax.precision.fp8_tiles import BLOCK, FLOOR, LARGEST, Tiles
from deepseek_jax.precision.fp8_weights import Fp8Weight, Linear
from deepseek_jax.precision.token_tiles import TokenTiles, places

# A kernel's module in a program names the functions that it was traced in. Traced once, a quantiser
# of one array is the same at each use, and XLA computes it once.
_traced_once = functools.partial(jax.jit, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class HopperQuantiser:
    """Quantisers of a linear layer's operands on one GPU: inside `shard_map` only.

    Attributes:
      interpret: as in `fp8_quantise.quantise`.
    """

    interpret: Any = None

    @_traced_once
    def rows(self, source: TileSource) -> Tiles:
        """Tiles of 128 columns: values MD, scales M(D/128)."""
        found, _ = self._tiles(source, rows=True, tokens=False)
        return _of_rows(found, *source.shape)

    @_traced_once
    def tokens(self, source: TileSource) -> TokenTiles:
        """Tiles of 128 rows."""
        _, found = self._tiles(source, rows=False, tokens=True)
        return _of_tokens(found, source.shape[1])

    @_traced_once
    def both(self, source: TileSource) -> tuple[Tiles, TokenTiles]:
        """Results of `rows` and of `tokens`."""
        by_row, by_token = self._tiles(source, rows=True, tokens=True)
        return _of_rows(by_row, *source.shape), _of_tokens(by_token, source.shape[1])

    @_traced_once
    def tokens_of_experts(self, source: TileSource, sizes: jax.Array) -> TokenTiles:
        """Tiles of tokens of one expert each, E int32 `sizes`; see `token_tiles.py`."""
        tiles = places(source.shape[0], sizes)
        _, found = self._tiles(source, rows=False, tokens=True, tiles=tiles)
        return _of_tokens(found, source.shape[1])

    def blocks(self, weight: jax.Array, linear: Linear) -> Fp8Weight:
        """The result of `fp8_weights.quantise_blocks`.

        Args:
          weight: float32, in the shape of the weight; a stack of layers in front.
          linear: dimensions that `takes_weight` takes.
        """
        return self._blocks(weight, linear, transposed=False)[0]

    def blocks_and_copy(self, weight: jax.Array, linear: Linear) -> tuple[Fp8Weight, jax.Array]:
        """`blocks`, and a transposed copy of the values, ...(outputs)(inputs)."""
        made, copy = self._blocks(weight, linear, transposed=True)
        assert copy is not None
        return made, copy

    def _blocks(
        self, weight: jax.Array, linear: Linear, transposed: bool
    ) -> tuple[Fp8Weight, jax.Array | None]:
        *experts, inputs, outputs = _matrices(weight, linear)
        values, scales, turned = fp8_quantise_blocks.quantise_blocks(
            padded(weight.reshape(-1, inputs, outputs), 1, 2),
            transposed=transposed,
            largest=LARGEST,
            floor=FLOOR,
            interpret=self.interpret,
        )
        made = Fp8Weight(
            values[:, :inputs, :outputs].reshape(weight.shape),
            scales.reshape(*experts, *scales.shape[1:]),
        )
        if turned is not None:
            turned = turned[:, :outputs, :inputs].reshape(*experts, outputs, inputs)
        return made, turned

    def _tiles(self, source: TileSource, **wanted: Any) -> Any:
        operands, make = source.operands()
        width = source.shape[1]
        return fp8_quantise.quantise(
            operands,
            make,
            width + -width % BLOCK,
            **wanted,
            largest=LARGEST,
            floor=FLOOR,
            interpret=self.interpret,
        )


def takes_weight(weight: jax.Array, linear: Linear) -> bool:
    """Whether `HopperQuantiser.blocks` makes the blocks of a weight, which must be float32.

    This device must hold whole matrices, with their inputs first; it may hold some of the experts.
    The largest magnitude of a block that devices share is known only after a message, so a second
    reading is needed anyway.
    """
    held = weight.shape[weight.ndim - len(linear.roles) :]
    sizes = zip(linear.roles, linear.sizes, held, linear.used_sizes, strict=True)
    whole = all(role == "-" or size == part == used for role, size, part, used in sizes)
    in_order = not linear.roles.lstrip("-").lstrip("i").lstrip("o")
    alone = whole and in_order and not linear.over and {"i", "o"} <= set(linear.roles)
    return alone and weight.dtype == jnp.float32


def _matrices(weight: jax.Array, linear: Linear) -> tuple[int, ...]:
    """Sizes of the matrices of a weight: ..., inputs, outputs."""
    dims = len(linear.roles)
    sizes = dict.fromkeys("io", 1)
    experts = weight.shape[: weight.ndim - dims]
    for role, size in zip(linear.roles, weight.shape[weight.ndim - dims :], strict=True):
        if role == "-":
            experts = (*experts, size)
        else:
            sizes[role] *= size
    return *experts, sizes["i"], sizes["o"]


def _of_rows(found: fp8_quantise.Pair, rows: int, columns: int) -> Tiles:
    values, scales = found
    return Tiles(values[:rows, :columns], scales.mT[:rows])


def _of_tokens(found: fp8_quantise.Pair, columns: int) -> TokenTiles:
    values, scales = found
    return TokenTiles(values[:columns], scales[:, :columns])
