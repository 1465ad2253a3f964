"""FP8 tiles and weights by the quantisers for Hopper, on the types of the portable form.

M rows, D columns, T tiles of an expert's tokens, E experts.

A quantiser reads one of the sources of `fp8_sources.py` once, and returns tiles of 128 columns, of
128 tokens, or both: those of `fp8_tiles.quantise_tiles` of `source.portable()`, bit for bit. Scales
are powers of two. Free scales need a division, which XLA and a kernel may round differently on a
GPU: they stay portable, as does what does not fit (`TileSource.fits`, `takes_weight`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.kernels import fp8_quantise, fp8_quantise_blocks
from deepseek_jax.precision.fp8_grouped import quantise_rows, rows_of_tiles
from deepseek_jax.precision.fp8_sources import TileSource, padded
from deepseek_jax.precision.fp8_tiles import BLOCK, FLOOR, LARGEST, Tiles
from deepseek_jax.precision.fp8_weights import Fp8Weight, Linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTiles:
    """Tiles of 128 tokens, transposed: an operand of `kernels/fp8_outer.py`.

    Attributes:
      values: D(128 T) float8_e4m3fn.
      scales: TD float32.
    """

    values: jax.Array
    scales: jax.Array


@dataclasses.dataclass(frozen=True)
class HopperQuantiser:
    """Quantisers of a linear layer's operands on one GPU: inside `shard_map` only.

    Attributes:
      interpret: as in `fp8_quantise.quantise`.
    """

    interpret: Any = None

    def rows(self, source: TileSource) -> Tiles:
        """Tiles of 128 columns: values MD, scales M(D/128)."""
        found, _ = self._tiles(source, rows=True, tokens=False)
        return _of_rows(found, *source.shape)

    def tokens(self, source: TileSource) -> Tiles:
        """Tiles of 128 rows: values MD, scales (M/128)D. In memory, values are transposed."""
        _, found = self._tiles(source, rows=False, tokens=True)
        return _of_tokens(found, *source.shape)

    def both(self, source: TileSource) -> tuple[Tiles, Tiles]:
        """Results of `rows` and of `tokens`."""
        by_row, by_token = self._tiles(source, rows=True, tokens=True)
        return _of_rows(by_row, *source.shape), _of_tokens(by_token, *source.shape)

    def tokens_of_experts(self, source: TileSource, sizes: jax.Array) -> TokenTiles:
        """Tiles of tokens of one expert each; see `portable_tokens_of_experts`."""
        columns = source.shape[1]
        found = self._tiles(source, rows=False, tokens=True, tiles=_places(source.shape[0], sizes))
        values, scales = found[1]
        return TokenTiles(values[:columns], scales[:, :columns])

    def blocks(self, weight: jax.Array, linear: Linear) -> tuple[Fp8Weight, jax.Array]:
        """Blocks of a weight, and a transposed copy of its values.

        Args:
          weight: float32, in the shape of the weight; a stack of layers in front.
          linear: dimensions that `takes_weight` takes.

        Returns:
          `fp8_weights.quantise_blocks` of the same, and values ...(outputs)(inputs).
        """
        *experts, inputs, outputs = _matrices(weight, linear)
        values, scales, turned = fp8_quantise_blocks.quantise_blocks(
            padded(weight.reshape(-1, inputs, outputs), 1, 2),
            transposed=True,
            largest=LARGEST,
            floor=FLOOR,
            interpret=self.interpret,
        )
        assert turned is not None
        scales = scales.reshape(*experts, *scales.shape[1:])
        return (
            Fp8Weight(values[:, :inputs, :outputs].reshape(weight.shape), scales),
            turned[:, :outputs, :inputs].reshape(*experts, outputs, inputs),
        )

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


def portable_tokens_of_experts(source: TileSource, sizes: jax.Array) -> TokenTiles:
    """Tiles of `fp8_grouped.quantise_rows`, transposed and with zeros where a tile is not full.

    A tile holds its tokens in an order that follows from `sizes` (`kernels/fp8_quantise.py`). Only
    a sum over tokens, of two such operands of equal `sizes`, does not depend on it.

    Args:
      source: rows sorted by expert.
      sizes: E int32, rows of each expert; may be zero.
    """
    x = source.portable()
    tiles = quantise_rows(x, sizes, True)
    first, start, end = (part[:, None] for part in _places(x.shape[0], sizes).T)
    row = first * fp8_quantise.PART + jnp.arange(BLOCK, dtype=jnp.int32)[None]  # T128
    row = jnp.where(row < start, row + BLOCK, row)
    own = tiles.values.at[jnp.minimum(row, x.shape[0] - 1)].get(mode="promise_in_bounds")  # T128D
    own = jnp.where((row < end)[..., None], own, jnp.zeros((), own.dtype))
    return TokenTiles(own.reshape(-1, x.shape[1]).mT, tiles.scales)


def _places(count: int, sizes: jax.Array) -> jax.Array:
    """The argument `tiles` of `fp8_quantise.quantise`, T3 int32."""
    row, inside = rows_of_tiles(count, sizes)
    first = row[:, 0].astype(jnp.int32)
    return jnp.stack([first // fp8_quantise.PART, first, first + inside.sum(1, dtype=jnp.int32)], 1)


def takes_weight(shape: tuple[int, ...], linear: Linear) -> bool:
    """Whether `HopperQuantiser.blocks` makes the blocks of a float32 weight of this shape.

    This device must hold whole matrices, with their inputs first; it may hold some of the experts.
    The largest magnitude of a block that devices share is known only after a message, so a second
    reading is needed anyway.
    """
    held = shape[len(shape) - len(linear.roles) :]
    sizes = zip(linear.roles, linear.sizes, held, linear.used_sizes, strict=True)
    whole = all(role == "-" or size == part == used for role, size, part, used in sizes)
    in_order = not linear.roles.lstrip("-").lstrip("i").lstrip("o")
    return whole and in_order and not linear.over and {"i", "o"} <= set(linear.roles)


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


def _of_tokens(found: fp8_quantise.Pair, rows: int, columns: int) -> Tiles:
    values, scales = found
    return Tiles(values.mT[:rows, :columns], scales[:, :columns])
