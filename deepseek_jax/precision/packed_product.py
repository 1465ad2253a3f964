"""Products of few rows with packed weights: matrices cut into strips of columns.

B matrices of a batch, M rows, D width in, X width out; in this module N is the number of strips
and W the columns of one strip.

A product of few rows is bound by reading the weight. XLA's matmul for CPUs walks down a block of
columns. Where a row of the weight is longer than that block, each read is on another cache line,
which no prefetcher foresees: a third of the memory's bandwidth. The reads of a strip are
consecutive. Measured on one core, weights not in cache, M from 2 to 8: strips of 64 columns take
half the time.
"""

import jax
from jax.typing import DTypeLike

from deepseek_jax.precision.einsum import exact_einsum

WIDTH = 64  # columns of a strip


def pack(weight: jax.Array) -> jax.Array:
    """BDX -> (BN)DW: the columns of each matrix in strips, or in one if WIDTH does not divide X."""
    batch, depth, columns = weight.shape
    width = columns if columns % WIDTH else WIDTH
    strips = weight.reshape(batch, depth, columns // width, width).swapaxes(1, 2)  # BNDW
    return strips.reshape(-1, depth, width)


def packed_product(rows: jax.Array, strips: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """BMD times a packed BDX -> BMX, summed in float32.

    Args:
      rows: BMD.
      strips: (BN)DW, made by `pack`.
      dtype: of the result; None for that of `rows`.
    """
    batch, count, _ = rows.shape
    each = rows.repeat(strips.shape[0] // batch, axis=0)  # (BN)MD
    out = exact_einsum("SMD,SDW->SMW", each, strips.astype(rows.dtype)).astype(dtype or rows.dtype)
    return out.reshape(batch, -1, count, strips.shape[-1]).swapaxes(1, 2).reshape(batch, count, -1)
