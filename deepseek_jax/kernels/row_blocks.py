"""Blocks of rows that are sorted by expert: who owns the rows of each block.

M rows, E experts, each with a run of rows of any length, none included; rows after the last run are
nobody's. Kernels cut the rows into blocks of equal height wherever the runs begin. A block is
computed once for each expert that has rows in it, and keeps of each time the rows of that expert:
it *visits* the expert. So all loads and stores are of whole blocks, and every row is stored once.

The tables are made on the device from the number of rows of each expert; nothing is read back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class RowBlocks(NamedTuple):
    """Tables that a kernel reads, int32.

    Attributes:
      visits: (blocks)2: the first row of `experts` that a block visits, and the number of them.
      experts: E3: expert, its first row, and the row after its last; those with rows, in order,
        come first. What follows them is undefined.
    """

    visits: jax.Array
    experts: jax.Array


def row_blocks(sizes: jax.Array, rows: int, height: int) -> RowBlocks:
    """Tables of blocks of `height` rows.

    Args:
      sizes: E int32, rows of each expert; may be zero; no more than `rows` in all.
      rows: M, a multiple of `height`.
    """
    sizes = sizes.astype(jnp.int32)
    ends, with_rows = jnp.cumsum(sizes), jnp.cumsum(sizes > 0)
    # "compare_all" because the other methods of searchsorted are a loop or a sort.
    expert = jnp.searchsorted(with_rows, jnp.arange(sizes.size), side="right", method="compare_all")
    expert = jnp.minimum(expert, sizes.size - 1).astype(jnp.int32)
    first_row = jnp.arange(0, rows, height, dtype=jnp.int32)[:, None]
    ended = (ends[None] <= first_row) & (sizes > 0)[None]
    begun = ((ends - sizes)[None] < first_row + height) & (sizes > 0)[None]
    before = ended.sum(1, dtype=jnp.int32)
    visits = jnp.stack([before, begun.sum(1, dtype=jnp.int32) - before], 1)
    table = jnp.stack([expert, (ends - sizes)[expert], ends[expert]], 1)
    return RowBlocks(visits, table)


def one_expert(rows: int, height: int) -> RowBlocks:
    """Tables of rows that all belong to one expert."""
    visits = np.tile(np.array([0, 1], np.int32), (rows // height, 1))
    return RowBlocks(jnp.asarray(visits), jnp.asarray([[0, 0, rows]], jnp.int32))
