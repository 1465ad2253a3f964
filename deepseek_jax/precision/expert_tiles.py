"""Rows sorted by expert in tiles of 128 along the rows: which rows a tile has, and back.

M rows, E experts, T tiles. A tile holds up to 128 rows of one expert: the first begins with the
expert's first row, the last may be shorter.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.precision.fp8_tiles import BLOCK


def rows_of_tiles(count: int, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of each tile of `count` rows, T128 in [0, count), and whether they are its own."""
    ends = jnp.cumsum(sizes)
    tiles, last = (sizes + BLOCK - 1) // BLOCK, _tile_ends(sizes)
    number = jnp.arange(_most_tiles(count, sizes.shape[0]), dtype=sizes.dtype)
    expert = jnp.minimum(jnp.searchsorted(last, number, side="right"), sizes.shape[0] - 1)
    first = (ends - sizes)[expert] + (number - (last - tiles)[expert]) * BLOCK
    row = first[:, None] + jnp.arange(BLOCK, dtype=sizes.dtype)[None]
    inside = (row < ends[expert][:, None]) & (number < last[-1])[:, None]
    return jnp.minimum(row, count - 1), inside


def tile_of_row(count: int, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tile of each row, M, and M1 whether the row is an expert's."""
    ends, last = jnp.cumsum(sizes), _tile_ends(sizes)
    number = jnp.arange(count, dtype=sizes.dtype)
    expert = jnp.minimum(jnp.searchsorted(ends, number, side="right"), sizes.shape[0] - 1)
    first = (last - (sizes + BLOCK - 1) // BLOCK)[expert]
    tile = first + (number - (ends - sizes)[expert]) // BLOCK
    most = _most_tiles(count, sizes.shape[0])
    return jnp.clip(tile, 0, most - 1), (number < ends[-1])[:, None]


def _most_tiles(rows: int, experts: int) -> int:
    """T: most tiles that so many rows of so many experts need."""
    return min(rows // BLOCK + experts, rows)


def _tile_ends(sizes: jax.Array) -> jax.Array:
    return jnp.cumsum((sizes + BLOCK - 1) // BLOCK)
