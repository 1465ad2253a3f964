"""Products of few rows, from weights that lie in strips.

B matrices of a batch, M rows, D width in, X width out, N strips of W columns.

To multiply a few rows costs what it takes to read the weight. XLA's matmul for CPUs walks down a
block of columns, and where a row of the weight is longer than the block, each of its reads is on
another line, which no prefetcher guesses: a third of what memory gives. In strips all reads follow
one another. Measured on one core, cold, M from 2 to 8: strips of 64 take half the time.
"""

from typing import Any

import jax

from deepseek_jax.precision.einsum import exact_einsum

WIDTH = 64


def pack(weight: jax.Array) -> jax.Array:
    """BDX -> (BN)DW: the columns of each matrix in strips; in one, if they do not divide."""
    batch, depth, columns = weight.shape
    width = columns if columns % WIDTH else WIDTH
    strips = weight.reshape(batch, depth, columns // width, width).swapaxes(1, 2)  # BNDW
    return strips.reshape(-1, depth, width)


def packed_product(rows: jax.Array, strips: jax.Array, dtype: Any = None) -> jax.Array:
    """BMD, and what `cut` made of BDX -> BMX, summed in float32; `dtype` is else that of `rows`."""
    batch, count, _ = rows.shape
    each = rows.repeat(strips.shape[0] // batch, axis=0)  # (BN)MD
    out = exact_einsum("SMD,SDW->SMW", each, strips.astype(rows.dtype)).astype(dtype or rows.dtype)
    return out.reshape(batch, -1, count, strips.shape[-1]).swapaxes(1, 2).reshape(batch, count, -1)
