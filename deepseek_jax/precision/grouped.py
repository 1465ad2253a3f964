"""Grouped matmul: rows sorted by expert, each multiplied by its own expert's weight.

M rows, D width in, F width out, E experts, J rows of an expert's share: a little over the even one.

Each expert's share of the rows goes through one batched matmul. What an expert has beyond its
share is walked in blocks, by a loop whose length is the number of blocks there really are. A
balanced router leaves little for the loop, and the worst one (every row for one expert) costs twice
the matmul of its rows, whatever E is.

On a GPU each round of such a loop is a read-back to the host; there the kernels of
`grouped_kernel.py` take over.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.kernels import grouped_triton
from deepseek_jax.precision.einsum import exact_einsum

# Measured on CPU: rows of a block of the loop; a share over the even one, so that small unevenness
# needs no loop; below how large a share rows are few, as when decoding, and go in fours, or, where
# there are fewer than experts, each by itself.
BLOCK_ROWS = 128
SLACK = 1.125
FEW_ROWS = 16

# (portable function, kernel with the same arguments and results) -> the function to call
Backend = Callable[[Callable[..., Any], Callable[..., Any]], Callable[..., Any]]


def by_platform(portable: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel where the program is lowered for CUDA, wherever that is done."""
    return lambda *arguments: lax.platform_dependent(*arguments, cuda=kernel, default=portable)


def grouped_matmul(
    rows: jax.Array,
    weight: jax.Array,
    sizes: jax.Array,
    *,
    likely: int,
    backend: Backend = by_platform,
) -> jax.Array:
    """out[m] = rows[m] @ weight[expert of m]; float32 accumulation, `rows.dtype` out.

    Args:
      rows: MD, sorted by expert; rows past sum(sizes) belong to nobody.
      weight: EDF, same dtype.
      sizes: E int32, rows of each expert; may be zero.
      likely: how many of the M rows there usually are. Steers cost, never results.
      backend: chooses between the portable form and the kernel.

    Returns:
      MF; rows past sum(sizes) are zero, in the gradient too.
    """
    share, block = _steer(min(likely, rows.shape[0]), weight.shape[0])
    return _grouped(rows, weight, sizes, share, min(block, rows.shape[0]), backend)


def _steer(likely: int, experts: int) -> tuple[int, int]:
    """J, and the rows of a block."""
    share = round(SLACK * likely / experts)
    if share >= FEW_ROWS:
        return -(-share // 8) * 8, BLOCK_ROWS
    if likely < experts:
        return 0, 1
    share = -(-share // 4) * 4
    return share, share


def reference(rows: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """The same in one masked einsum over all experts: E times the work, nothing to get wrong."""
    ends = jnp.cumsum(sizes)[:, None]
    row = jnp.arange(rows.shape[0])[None]
    mine = ((row >= ends - sizes[:, None]) & (row < ends)).astype(rows.dtype)  # EM
    return jnp.einsum("EM,MD,EDF->MF", mine, rows, weight)


def _in_shares(sizes: jax.Array, share: int, rows: int) -> tuple[jax.Array, ...]:
    """Row of each slot EJ and whether it holds one; slot of each row M and whether it has one."""
    ends = jnp.cumsum(sizes)
    slot = jnp.arange(share, dtype=sizes.dtype)[None]
    row = jnp.minimum((ends - sizes)[:, None] + slot, rows - 1)
    number = jnp.arange(rows, dtype=sizes.dtype)
    expert = jnp.minimum(jnp.searchsorted(ends, number, side="right"), sizes.shape[0] - 1)
    place = number - (ends - sizes)[expert]
    has = (place < share) & (number < ends[-1])
    return row, slot < sizes[:, None], expert * share + jnp.minimum(place, share - 1), has


def _beyond(sizes: jax.Array, share: int, block: int, rows: int) -> tuple[jax.Array, ...]:
    """Blocks of what exceeds the shares: how many there are, expert and first row of each."""
    experts = sizes.shape[0]
    extra = jnp.maximum(sizes - share, 0)
    blocks = (extra + block - 1) // block
    last = jnp.cumsum(blocks)
    number = jnp.arange(min(rows // block + experts, rows), dtype=sizes.dtype)
    expert = jnp.minimum(jnp.searchsorted(last, number, side="right"), experts - 1)
    first = jnp.cumsum(sizes) - extra - (last - blocks) * block
    return last[-1], expert, first[expert] + number * block


def _masked(mask: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")


def _product(rows, weight, sizes, share, block, transpose):
    """rows @ weight[expert], or rows @ weight[expert]^T."""
    contract = "EJF,EDF->EJD" if transpose else "EJD,EDF->EJF"
    width = weight.shape[1 if transpose else 2]
    if share:
        row, _, slot, has = _in_shares(sizes, share, rows.shape[0])
        product = exact_einsum(contract, _take(rows, row), weight).astype(rows.dtype)
        out = _masked(has, _take(product.reshape(-1, width), slot))
    else:
        out = jnp.zeros((rows.shape[0], width), rows.dtype)
    count, experts, starts = _beyond(sizes, share, block, rows.shape[0])
    ends = jnp.cumsum(sizes)

    def body(i, out):
        # A block at the very end is moved back to fit; rows that are not its own stay as they are.
        row = jnp.minimum(starts[i], rows.shape[0] - block)
        number = row + jnp.arange(block)
        own = (number >= starts[i]) & (number < ends[experts[i]])
        matrix = lax.dynamic_index_in_dim(weight, experts[i])
        mine = lax.dynamic_slice_in_dim(rows, row, block)[None]
        product = exact_einsum(contract, mine, matrix)[0].astype(out.dtype)
        before = lax.dynamic_slice_in_dim(out, row, block)
        return lax.dynamic_update_slice_in_dim(
            out, jnp.where(own[:, None], product, before), row, 0
        )

    return lax.fori_loop(0, count, body, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _grouped(rows, weight, sizes, share, block, backend):
    portable = functools.partial(_product, share=share, block=block, transpose=False)
    return backend(portable, grouped_triton.product)(rows, weight, sizes)


def _forward(rows, weight, sizes, share, block, backend):
    return _grouped(rows, weight, sizes, share, block, backend), (rows, weight, sizes)


def _rows_gradient(share, block, saved, d_out):
    _, weight, sizes = saved
    return _product(d_out, weight, sizes, share, block, transpose=True)


def _weight_gradient(share, block, saved, d_out):
    rows, weight, sizes = saved
    if share:
        row, used, _, _ = _in_shares(sizes, share, rows.shape[0])
        mine, theirs = _masked(used, _take(rows, row)), _take(d_out, row)
        d_weight = exact_einsum("EJD,EJF->EDF", mine, theirs)
    else:
        d_weight = jnp.zeros(weight.shape, jnp.float32)
    count, experts, starts = _beyond(sizes, share, block, rows.shape[0])
    ends = jnp.cumsum(sizes)

    def body(i, total):
        row = jnp.minimum(starts[i], rows.shape[0] - block)
        number = row + jnp.arange(block)
        own = (number >= starts[i]) & (number < ends[experts[i]])
        mine = _masked(own, lax.dynamic_slice_in_dim(rows, row, block))
        theirs = lax.dynamic_slice_in_dim(d_out, row, block)
        so_far = lax.dynamic_index_in_dim(total, experts[i], keepdims=False)
        more = so_far + exact_einsum("MD,MF->DF", mine, theirs)
        return lax.dynamic_update_index_in_dim(total, more, experts[i], 0)

    return lax.fori_loop(0, count, body, d_weight).astype(weight.dtype)


def _gradients(share, block, backend, saved, d_out):
    # The choice is made here and not around all of it, or both forms would save what they need; and
    # for each gradient apart, for that of the weight may be made later.
    makers = (
        (_rows_gradient, grouped_triton.rows_gradient),
        (_weight_gradient, grouped_triton.weight_gradient),
    )
    d_rows, d_weight = (
        backend(functools.partial(portable, share, block), kernel)(saved, d_out)
        for portable, kernel in makers
    )
    return d_rows, d_weight, None


_grouped.defvjp(_forward, _gradients)
