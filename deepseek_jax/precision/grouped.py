"""Grouped matmul: rows sorted by expert, each multiplied by the weight of its expert.

M rows, D width in, F width out, E experts, B rows of a block.

A loop takes the rows of each expert in blocks, one matmul after the other, so that the operands of
each lie in the cache. Its trip count is the number of blocks that the sizes really need: the most
uneven router (all rows for one expert) costs no more than a balanced one, whatever E is.

On a GPU each iteration of such a loop is a read-back to the host, so programs for CUDA call the
kernels of `kernels/grouped_triton.py` instead.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from deepseek_jax.kernels import grouped_triton
from deepseek_jax.kernels.grouped_triton import Saved
from deepseek_jax.precision.einsum import exact_einsum

# Two numbers measured on a CPU.
BLOCK_ROWS = 320  # most rows of a block
SLACK = 1.125  # rows of an expert over the even number, so that small unevenness adds no block

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
      block: B.
      backend: chooses between the portable form and the kernel.
    """

    block: int
    backend: Backend

    def product(self, rows: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
        """Product rows @ weight[expert], MF in the dtype of the rows."""
        portable = functools.partial(_product, block=self.block, transpose=False)
        return self.backend(portable, grouped_triton.product)(rows, weight, sizes)

    def rows_gradient(self, saved: Saved, d_out: jax.Array) -> jax.Array:
        """Gradient of the rows MD, in the dtype of `d_out`."""
        portable = functools.partial(_rows_gradient, self.block)
        return self.backend(portable, grouped_triton.rows_gradient)(saved, d_out)

    def weight_gradient(
        self, saved: Saved, d_out: jax.Array, shape: tuple[int, ...], dtype: DTypeLike
    ) -> jax.Array:
        """Gradient of the weight, EDF = `shape`, summed in float32 and rounded to `dtype`."""
        portable = functools.partial(_weight_gradient, self.block, shape, dtype)
        kernel = functools.partial(grouped_triton.weight_gradient, shape=shape, dtype=dtype)
        return self.backend(portable, kernel)(saved, d_out)


def plan(rows: int, experts: int, likely: int, backend: Backend = by_platform) -> Plan:
    """The plan for M = `rows` and E = `experts`; the rest as in `grouped_matmul`."""
    return Plan(min(_block(min(likely, rows), experts), rows), backend)


def _block(likely: int, experts: int) -> int:
    """Rows of a block (B): those of an expert where the router is balanced, or an even part."""
    usual = SLACK * likely / experts
    if usual <= 1:
        return 1
    parts = math.ceil(usual / BLOCK_ROWS)
    return 4 * math.ceil(usual / parts / 4)


def reference(rows: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """`grouped_matmul` as one masked einsum over all experts: E times the work, for tests."""
    ends = jnp.cumsum(sizes)[:, None]
    row = jnp.arange(rows.shape[0])[None]
    mine = ((row >= ends - sizes[:, None]) & (row < ends)).astype(rows.dtype)  # EM
    return jnp.einsum("EM,MD,EDF->MF", mine, rows, weight)


def _blocks(sizes: jax.Array, block: int, rows: int) -> tuple[jax.Array, ...]:
    """Blocks of all experts: their number, and expert, first row and end of each."""
    experts = sizes.shape[0]
    blocks = (sizes + block - 1) // block
    last = jnp.cumsum(blocks)
    number = jnp.arange(min(rows // block + experts, rows), dtype=sizes.dtype)
    expert = jnp.minimum(jnp.searchsorted(last, number, side="right"), experts - 1)
    ends = jnp.cumsum(sizes)
    first = (ends - sizes)[expert] + (number - (last - blocks)[expert]) * block
    return last[-1], expert, first, ends[expert]


def _own(first: jax.Array, end: jax.Array, block: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """First row of a block that is moved back to fit into M rows, and which of its rows are own."""
    row = jnp.minimum(first, rows - block)
    number = row + jnp.arange(block)
    return row, ((number >= first) & (number < end))[:, None]


def _product(
    rows: jax.Array, weight: jax.Array, sizes: jax.Array, block: int, transpose: bool
) -> jax.Array:
    """Product rows @ weight[expert], or rows @ weight[expert]^T."""
    contract = "MF,DF->MD" if transpose else "MD,DF->MF"
    count, experts, firsts, ends = _blocks(sizes, block, rows.shape[0])

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        row, own = _own(firsts[i], ends[i], block, rows.shape[0])
        matrix = lax.dynamic_index_in_dim(weight, experts[i], keepdims=False)
        mine = lax.dynamic_slice_in_dim(rows, row, block)
        product = exact_einsum(contract, mine, matrix).astype(out.dtype)
        before = lax.dynamic_slice_in_dim(out, row, block)  # rows of other blocks keep their values
        return lax.dynamic_update_slice_in_dim(out, jnp.where(own, product, before), row, 0)

    width = weight.shape[1 if transpose else 2]
    return lax.fori_loop(0, count, body, jnp.zeros((rows.shape[0], width), rows.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(rows: jax.Array, weight: jax.Array, sizes: jax.Array, plan: Plan) -> jax.Array:
    return plan.product(rows, weight, sizes)


def _forward(
    rows: jax.Array, weight: jax.Array, sizes: jax.Array, plan: Plan
) -> tuple[jax.Array, Saved]:
    return _grouped(rows, weight, sizes, plan), (rows, weight, sizes)


def _rows_gradient(block: int, saved: Saved, d_out: jax.Array) -> jax.Array:
    _, weight, sizes = saved
    return _product(d_out, weight, sizes, block, transpose=True)


def _weight_gradient(
    block: int, shape: tuple[int, ...], dtype: DTypeLike, saved: Saved, d_out: jax.Array
) -> jax.Array:
    rows, _, sizes = saved
    count, experts, firsts, ends = _blocks(sizes, block, rows.shape[0])

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        row, own = _own(firsts[i], ends[i], block, rows.shape[0])
        mine = jnp.where(own, lax.dynamic_slice_in_dim(rows, row, block), 0)
        theirs = lax.dynamic_slice_in_dim(d_out, row, block)
        so_far = lax.dynamic_index_in_dim(total, experts[i], keepdims=False)
        more = so_far + exact_einsum("MD,MF->DF", mine, theirs)
        return lax.dynamic_update_index_in_dim(total, more, experts[i], 0)

    return lax.fori_loop(0, count, body, jnp.zeros(shape, jnp.float32)).astype(dtype)


def _gradients(plan: Plan, saved: Saved, d_out: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    weight = saved[1]
    d_weight = plan.weight_gradient(saved, d_out, weight.shape, weight.dtype)
    return plan.rows_gradient(saved, d_out), d_weight, None


_grouped.defvjp(_forward, _gradients)
