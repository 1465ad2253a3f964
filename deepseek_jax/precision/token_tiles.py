"""Tiles of 128 tokens, transposed, as the gradient of a weight contracts them on a Hopper GPU.

M rows, D columns, T tiles, E experts.

Without `sizes` tile t has rows 128 t to 128 t + 127. With `sizes`, E int32, rows are sorted by
expert, and tiles are those of `expert_tiles`, each with its tokens in an order that follows from
`sizes` (`kernels/fp8_quantise.py`). Only a sum over tokens, of two such operands of equal `sizes`,
does not depend on the order.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from deepseek_jax.kernels.fp8_quantise import PART
from deepseek_jax.precision.expert_tiles import quantise_rows, rows_of_tiles, tile_of_row
from deepseek_jax.precision.fp8_tiles import BLOCK, Tiles, quantise_tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTiles:
    """An operand of `kernels/fp8_outer.py`.

    Attributes:
      values: D(128 T) float8_e4m3fn; where a tile is not full, zero, or NaN as the rest of it.
      scales: TD float32.
    """

    values: jax.Array
    scales: jax.Array


def quantise_tokens(x: jax.Array, sizes: jax.Array | None, power_of_two: bool) -> TokenTiles:
    """Tiles of x MD: those of `quantise_tiles` along rows, or of `quantise_rows`, transposed."""
    if sizes is None:
        tiles = quantise_tiles(x, power_of_two=power_of_two, axis=-2)
        own = jnp.pad(tiles.values, ((0, -x.shape[0] % BLOCK), (0, 0)))
        return TokenTiles(turned(own), tiles.scales)
    tiles = quantise_rows(x, sizes, power_of_two)
    first, start, end = (part[:, None] for part in places(x.shape[0], sizes).T)
    row = first * PART + jnp.arange(BLOCK, dtype=jnp.int32)[None]  # T128
    row = jnp.where(row < start, row + BLOCK, row)
    own = tiles.values.at[jnp.minimum(row, x.shape[0] - 1)].get(mode="promise_in_bounds")  # T128D
    own = jnp.where((row < end)[..., None], own, jnp.zeros((), own.dtype))
    return TokenTiles(turned(own.reshape(-1, x.shape[1])), tiles.scales)


def in_rows(tiles: Tiles | TokenTiles, count: int, sizes: jax.Array | None = None) -> Tiles:
    """The same tiles, as the portable form has them: `count` rows in their order."""
    if isinstance(tiles, Tiles):
        return tiles
    if sizes is None:
        return Tiles(tiles.values.mT[:count], tiles.scales)
    tile, real = tile_of_row(count, sizes)
    first = places(count, sizes)[:, 0] * PART
    number = jnp.arange(count, dtype=jnp.int32)
    place = tile * BLOCK + (number - first.at[tile].get(mode="promise_in_bounds")) % BLOCK
    own = tiles.values.mT.at[place].get(mode="promise_in_bounds")
    return Tiles(jnp.where(real, own, jnp.zeros((), own.dtype)), tiles.scales)


def places(count: int, sizes: jax.Array) -> jax.Array:
    """The argument `tiles` of `fp8_quantise.quantise`, T3 int32."""
    row, inside = rows_of_tiles(count, sizes)
    first = row[:, 0].astype(jnp.int32)
    return jnp.stack([first // PART, first, first + inside.sum(1, dtype=jnp.int32)], 1)


def turned(x: jax.Array) -> jax.Array:
    """The transposed copy of matrices, made here.

    A kernel wants its operands in row-major order. XLA would choose the transposed order for
    whatever the array comes from instead, up to the residuals of a pipeline, and copy all of them.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))).mT
