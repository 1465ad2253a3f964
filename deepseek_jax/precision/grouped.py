"""Grouped matmul: rows sorted by expert, each multiplied by its own expert's weight.

M rows, D width in, F width out, E experts. The rows are walked in blocks, each within one expert, by
a loop whose length is the number of blocks there really are: cost follows the rows present, not E.

The last block of an expert may reach into the next expert's rows. Blocks are walked in order, so what
it wrote there is overwritten by the right expert; no row is ever padded to a block boundary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_ROWS = {"cpu": 128, "gpu": 512}  # measured on CPU; on GPU not yet


def grouped_matmul(rows: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """out[m] = rows[m] @ weight[expert of m]; float32 accumulation, `rows.dtype` out.

    Args:
      rows: MD, sorted by expert; rows past sum(sizes) belong to nobody.
      weight: EDF, same dtype.
      sizes: E int32, rows of each expert; may be zero.

    Returns:
      MF; rows past sum(sizes) are zero, in the gradient too.
    """
    return _grouped(rows, weight, sizes, _block_rows(rows.shape[0]))


def reference(rows: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """The same in one masked einsum over all experts: E times the work, nothing to get wrong."""
    ends = jnp.cumsum(sizes)[:, None]
    row = jnp.arange(rows.shape[0])[None]
    mine = ((row >= ends - sizes[:, None]) & (row < ends)).astype(rows.dtype)  # EM
    return jnp.einsum("EM,MD,EDF->MF", mine, rows, weight)


def _block_rows(rows: int) -> int:
    return min(BLOCK_ROWS.get(jax.default_backend(), 128), max(8, rows))


def _walk(sizes: jax.Array, block: int):
    """(number of blocks, block number -> (expert, first row, rows that are the expert's own))."""
    blocks = (sizes + block - 1) // block
    last = jnp.cumsum(blocks)
    first_row = jnp.cumsum(sizes) - sizes

    def locate(i):
        expert = jnp.searchsorted(last, i, side="right").astype(jnp.int32)
        within = (i - (last[expert] - blocks[expert])) * block
        return expert, first_row[expert] + within, sizes[expert] - within

    return last[-1], locate


def _pad(rows: jax.Array, block: int) -> jax.Array:
    return jnp.pad(rows, ((0, block), (0, 0)))  # the last block may run over the end


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _product(rows, weight, sizes, block, transpose):
    """rows @ weight[expert], or rows @ weight[expert]^T."""
    count, locate = _walk(sizes, block)
    padded = _pad(rows, block)
    width = weight.shape[1 if transpose else 2]

    def body(i, out):
        expert, row, _ = locate(i)
        mine = lax.dynamic_slice_in_dim(padded, row, block)
        matrix = lax.dynamic_index_in_dim(weight, expert, keepdims=False)
        product = _dot(mine, matrix, (1, 1 if transpose else 0)).astype(out.dtype)
        return lax.dynamic_update_slice_in_dim(out, product, row, 0)

    out = lax.fori_loop(0, count, body, jnp.zeros((padded.shape[0], width), rows.dtype))
    beyond = jnp.arange(rows.shape[0]) >= sizes.sum()
    return jnp.where(beyond[:, None], jnp.zeros((), out.dtype), out[: rows.shape[0]])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(rows, weight, sizes, block):
    return _product(rows, weight, sizes, block, transpose=False)


def _forward(rows, weight, sizes, block):
    return _grouped(rows, weight, sizes, block), (rows, weight, sizes)


def _backward(block, saved, d_out):
    rows, weight, sizes = saved
    d_rows = _product(d_out, weight, sizes, block, transpose=True)
    count, locate = _walk(sizes, block)
    padded, d_padded = _pad(rows, block), _pad(d_out, block)

    def body(i, total):
        expert, row, own = locate(i)
        mine = lax.dynamic_slice_in_dim(padded, row, block)
        mine = jnp.where((jnp.arange(block) < own)[:, None], mine, jnp.zeros((), mine.dtype))
        theirs = lax.dynamic_slice_in_dim(d_padded, row, block)
        so_far = lax.dynamic_index_in_dim(total, expert, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, so_far + _dot(mine, theirs, (0, 0)), expert, 0)

    d_weight = lax.fori_loop(0, count, body, jnp.zeros(weight.shape, jnp.float32))
    return d_rows, d_weight.astype(weight.dtype), None


_grouped.defvjp(_forward, _backward)
