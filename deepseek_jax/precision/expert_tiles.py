"""Rows sorted by expert in FP8 tiles of 128 along the rows: which rows a tile has, and back.

M rows, D width, E experts, T tiles. A tile holds up to 128 rows of one expert: the first begins
with the expert's first row, the last may be shorter.
"""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.precision.fp8_tiles import (
    BLOCK,
    Tiles,
    as_floats,
    as_integers,
    quantised,
    scales_of,
)


def quantise_rows(x: jax.Array, sizes: jax.Array, power_of_two: bool) -> Tiles:
    """Tiles of x MD along its rows, which are sorted by expert: values MD and scales TD.

    Rows past sum(sizes) are padding: their values are zero, and no scale depends on them.
    """
    x = x.astype(jnp.float32)
    count = x.shape[0]
    row, inside = rows_of_tiles(count, sizes)
    own = jnp.abs(x).at[row].get(mode="promise_in_bounds")  # T128D
    largest = as_integers(jnp.where(inside[..., None], own, 0)).max(1)
    scales = scales_of(as_floats(largest), power_of_two)
    tile, real = tile_of_row(count, sizes)
    values = quantised(jnp.where(real, x, 0), _of_rows(scales, tile), power_of_two)
    return Tiles(values, scales)


def dequantise_rows(tiles: Tiles, sizes: jax.Array, dtype: Any) -> jax.Array:
    """The rows MD of `quantise_rows`, in `dtype`."""
    tile, _ = tile_of_row(tiles.values.shape[0], sizes)
    return (tiles.values.astype(jnp.float32) * _of_rows(tiles.scales, tile)).astype(dtype)


def rows_of_tiles(count: int, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of each tile of `count` rows, T128 in [0, count), and whether they are its own."""
    ends = jnp.cumsum(sizes)
    tiles, last = (sizes + BLOCK - 1) // BLOCK, _tile_ends(sizes)
    number = jnp.arange(_most_tiles(count, sizes.shape[0]), dtype=sizes.dtype)
    expert = _owner(last, number)
    first = (ends - sizes)[expert] + (number - (last - tiles)[expert]) * BLOCK
    row = first[:, None] + jnp.arange(BLOCK, dtype=sizes.dtype)[None]
    inside = (row < ends[expert][:, None]) & (number < last[-1])[:, None]
    return jnp.minimum(row, count - 1), inside


def tile_of_row(count: int, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tile of each row, M, and M1 whether the row is an expert's."""
    ends, last = jnp.cumsum(sizes), _tile_ends(sizes)
    number = jnp.arange(count, dtype=sizes.dtype)
    expert = _owner(ends, number)
    first = (last - (sizes + BLOCK - 1) // BLOCK)[expert]
    tile = first + (number - (ends - sizes)[expert]) // BLOCK
    most = _most_tiles(count, sizes.shape[0])
    return jnp.clip(tile, 0, most - 1), (number < ends[-1])[:, None]


def _owner(ends: jax.Array, number: jax.Array) -> jax.Array:
    """Expert of each row or tile, given the one after each expert's last; the last one for others.

    By comparisons: a search would be a loop, of which a GPU waits for the host in each trip.
    """
    after = jnp.searchsorted(ends, number, side="right", method="compare_all")
    return jnp.minimum(after, ends.shape[0] - 1)


def _most_tiles(rows: int, experts: int) -> int:
    """T: most tiles that so many rows of so many experts need."""
    return min(rows // BLOCK + experts, rows)


def _tile_ends(sizes: jax.Array) -> jax.Array:
    return jnp.cumsum((sizes + BLOCK - 1) // BLOCK)


def _of_rows(scales: jax.Array, tile: jax.Array) -> jax.Array:
    return scales.at[tile].get(mode="promise_in_bounds")
