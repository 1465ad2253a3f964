"""Grouped matmul: rows sorted by expert, each multiplied by the weight of its expert.

M rows, D width in, F width out, E experts, J rows of a share.

One batched matmul computes the first J rows of every expert, its share, where J is a little above
M / E. A loop computes the remaining rows in blocks; its trip count is the number of blocks that the
sizes really need. A balanced router leaves few rows for the loop. The most uneven router (all rows
for one expert) costs twice the matmul of its rows, whatever E is.

On a GPU each iteration of such a loop is a read-back to the host, so programs for CUDA call the
kernels of `kernels/grouped_triton.py` instead.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from deepseek_jax.kernels import grouped_triton
from deepseek_jax.kernels.grouped_triton import Saved
from deepseek_jax.precision.einsum import exact_einsum, transposed

# Three numbers measured on a CPU.
BLOCK_ROWS = 128  # rows of a block of the loop
SLACK = 1.125  # a share over the even one, so that small unevenness needs no loop
# Below this share, as when decoding, shares and blocks are multiples of 4 rows; where there are
# fewer rows than experts, blocks are single rows and there is no share.
FEW_ROWS = 16

# Chooses from a portable function and a kernel with the same arguments and results.
Backend = Callable[[Callable[..., Any], Callable[..., Any]], Callable[..., Any]]


def by_platform(portable: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel in programs lowered for CUDA: the choice is by lowering platform, not by host.

    Under a mesh of CPU devices the kernel is not traced at all.
    """
    if mesh_is_of_cpus():
        return portable
    return lambda *arguments: lax.platform_dependent(*arguments, cuda=kernel, default=portable)


def mesh_is_of_cpus() -> bool:
    """Whether a program is traced under a mesh of CPU devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "cpu"


def grouped_matmul(
    rows: jax.Array,
    weight: jax.Array,
    sizes: jax.Array,
    *,
    likely: int,
    backend: Backend = by_platform,
) -> jax.Array:
    """Rows times the weight of their expert: out[m] = rows[m] @ weight[expert of m].

    Args:
      rows: MD, sorted by expert; rows past sum(sizes) are padding and never read.
      weight: EDF, same dtype.
      sizes: E int32, rows of each expert; may be zero.
      likely: usual number of rows that are no padding. Changes the cost, never the result.
      backend: chooses between the portable form and the kernel.

    Returns:
      MF, `rows.dtype`, summed in float32; padding is zero, in the gradient too.
    """
    return _grouped(rows, weight, sizes, plan(rows.shape[0], weight.shape[0], likely, backend))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Products of rows and weights of as many experts, forward and backward.

    Each chooses its backend separately: a single choice would keep the residuals of both forms, and
    the gradient of the weight may be deferred.

    Attributes:
      share: J.
      block: rows of a block of the loop.
      backend: chooses between the portable form and the kernel.
    """

    share: int
    block: int
    backend: Backend

    def product(self, rows: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
        """Product rows @ weight[expert], MF in the dtype of the rows."""
        portable = functools.partial(_product, share=self.share, block=self.block, transpose=False)
        return self.backend(portable, grouped_triton.product)(rows, weight, sizes)

    def rows_gradient(self, saved: Saved, d_out: jax.Array) -> jax.Array:
        """Gradient of the rows MD, in the dtype of `d_out`."""
        portable = functools.partial(_rows_gradient, self.share, self.block)
        return self.backend(portable, grouped_triton.rows_gradient)(saved, d_out)

    def weight_gradient(
        self, saved: Saved, d_out: jax.Array, shape: tuple[int, ...], dtype: DTypeLike
    ) -> jax.Array:
        """Gradient of the weight, EDF = `shape`, summed in float32 and rounded to `dtype`."""
        portable = functools.partial(_weight_gradient, self.share, self.block, shape, dtype)
        kernel = functools.partial(grouped_triton.weight_gradient, shape=shape, dtype=dtype)
        return self.backend(portable, kernel)(saved, d_out)


def plan(rows: int, experts: int, likely: int, backend: Backend = by_platform) -> Plan:
    """The plan for M = `rows` and E = `experts`; the rest as in `grouped_matmul`."""
    share, block = _share_and_block(min(likely, rows), experts)
    return Plan(share, min(block, rows), backend)


def _share_and_block(likely: int, experts: int) -> tuple[int, int]:
    """Rows of a share (J) and of a block of the loop."""
    share = round(SLACK * likely / experts)
    if share >= FEW_ROWS:
        return -(-share // 8) * 8, BLOCK_ROWS
    if likely < experts:
        return 0, 1
    share = -(-share // 4) * 4
    return share, share


def reference(rows: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """`grouped_matmul` as one masked einsum over all experts: E times the work, for tests."""
    ends = jnp.cumsum(sizes)[:, None]
    row = jnp.arange(rows.shape[0])[None]
    mine = ((row >= ends - sizes[:, None]) & (row < ends)).astype(rows.dtype)  # EM
    return jnp.einsum("EM,MD,EDF->MF", mine, rows, weight)


def _in_shares(sizes: jax.Array, share: int, rows: int) -> tuple[jax.Array, ...]:
    """Index maps from slots of the shares (EJ) to rows (M), and back.

    Returns:
      EJ row of each slot, EJ mask of slots that hold a row, M slot of each row in (EJ), M mask of
      rows that have a slot.
    """
    ends = jnp.cumsum(sizes)
    slot = jnp.arange(share, dtype=sizes.dtype)[None]
    row = jnp.minimum((ends - sizes)[:, None] + slot, rows - 1)
    number = jnp.arange(rows, dtype=sizes.dtype)
    expert = jnp.minimum(jnp.searchsorted(ends, number, side="right"), sizes.shape[0] - 1)
    nth = number - (ends - sizes)[expert]
    has = (nth < share) & (number < ends[-1])
    return row, slot < sizes[:, None], expert * share + jnp.minimum(nth, share - 1), has


def _overflow_blocks(sizes: jax.Array, share: int, block: int, rows: int) -> tuple[jax.Array, ...]:
    """Blocks of rows past an expert's first J: their number, and expert and first row of each."""
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


def _product(
    rows: jax.Array, weight: jax.Array, sizes: jax.Array, share: int, block: int, transpose: bool
) -> jax.Array:
    """Product rows @ weight[expert], or rows @ weight[expert]^T."""
    contract = "EJF,EDF->EJD" if transpose else "EJD,EDF->EJF"
    width = weight.shape[1 if transpose else 2]
    if share:
        row, _, slot, has = _in_shares(sizes, share, rows.shape[0])
        product = exact_einsum(contract, _take(rows, row), weight).astype(rows.dtype)
        out = _masked(has, _take(product.reshape(-1, width), slot))
    else:
        out = jnp.zeros((rows.shape[0], width), rows.dtype)
    count, experts, starts = _overflow_blocks(sizes, share, block, rows.shape[0])
    ends = jnp.cumsum(sizes)

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        # A block at the end is moved back to fit; rows of other blocks in it keep their values.
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(rows: jax.Array, weight: jax.Array, sizes: jax.Array, plan: Plan) -> jax.Array:
    return plan.product(rows, weight, sizes)


def _forward(
    rows: jax.Array, weight: jax.Array, sizes: jax.Array, plan: Plan
) -> tuple[jax.Array, Saved]:
    return _grouped(rows, weight, sizes, plan), (rows, weight, sizes)


def _rows_gradient(share: int, block: int, saved: Saved, d_out: jax.Array) -> jax.Array:
    _, weight, sizes = saved
    return _product(d_out, weight, sizes, share, block, transpose=True)


def _weight_gradient(
    share: int,
    block: int,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    saved: Saved,
    d_out: jax.Array,
) -> jax.Array:
    rows, _, sizes = saved
    if share:
        row, used, _, _ = _in_shares(sizes, share, rows.shape[0])
        mine, theirs = _masked(used, _take(rows, row)), _take(d_out, row)
        turned = transposed("EJD->EDJ", mine)
        d_weight = exact_einsum("EDJ,EJF->EDF", turned, theirs)
    else:
        d_weight = jnp.zeros(shape, jnp.float32)
    count, experts, starts = _overflow_blocks(sizes, share, block, rows.shape[0])
    ends = jnp.cumsum(sizes)

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        row = jnp.minimum(starts[i], rows.shape[0] - block)
        number = row + jnp.arange(block)
        own = (number >= starts[i]) & (number < ends[experts[i]])
        mine = _masked(own, lax.dynamic_slice_in_dim(rows, row, block))
        theirs = lax.dynamic_slice_in_dim(d_out, row, block)
        so_far = lax.dynamic_index_in_dim(total, experts[i], keepdims=False)
        more = so_far + exact_einsum("MD,MF->DF", mine, theirs)
        return lax.dynamic_update_index_in_dim(total, more, experts[i], 0)

    return lax.fori_loop(0, count, body, d_weight).astype(dtype)


def _gradients(plan: Plan, saved: Saved, d_out: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    weight = saved[1]
    d_weight = plan.weight_gradient(saved, d_out, weight.shape, weight.dtype)
    return plan.rows_gradient(saved, d_out), d_weight, None


_grouped.defvjp(_forward, _gradients)
