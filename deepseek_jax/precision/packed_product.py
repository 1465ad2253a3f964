"""Products of few rows with packed weights: the weight is the left operand, in two parts.

P parts, M rows, D width in, X width out.

A product of few rows is bound by reading the weight. XLA's matmul for CPUs reads its left operand
as it lies in memory, if the sum is over that operand's last axis, and copies its right operand into
another order first. So the weight is the left operand, transposed once when it is packed. A product
of this size runs on one core; its parts run side by side. Measured on two cores, 16 matrices of
256 x 256 not in cache, 8 rows: a third of the time of the same product with weights on the right.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from deepseek_jax.precision.einsum import exact_einsum

PARTS = 2


def pack_columns(weight: jax.Array) -> jax.Array:
    """DX -> P(X/P)D, for `product`: each part makes some columns of the result."""
    depth, columns = weight.shape
    return weight.T.reshape(_parts(columns), -1, depth)


def pack_sum(weight: jax.Array) -> jax.Array:
    """DX -> PX(D/P), for `sum_product`: each part adds some terms of every sum."""
    depth, columns = weight.shape
    return weight.T.reshape(columns, _parts(depth), -1).swapaxes(0, 1)


def _parts(size: int) -> int:
    return 1 if size % PARTS else PARTS


def product(rows: jax.Array, packed: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """Rows MD times a DX packed by `pack_columns` -> XM, summed in float32.

    Args:
      dtype: of the result; None for that of `rows`.
    """
    each = jnp.broadcast_to(rows, (packed.shape[0], *rows.shape))
    out = exact_einsum("PXD,PMD->PXM", packed.astype(rows.dtype), each)
    return out.reshape(-1, rows.shape[0]).astype(dtype or rows.dtype)


def sum_product(columns: jax.Array, packed: jax.Array) -> jax.Array:
    """Rows MD, given as DM, times a DX packed by `pack_sum` -> MX, summed in float32."""
    # In a fusion with what made the columns XLA computes each of them again for every result.
    each = lax.optimization_barrier(columns).reshape(packed.shape[0], -1, columns.shape[1])
    out = exact_einsum("PXD,PDM->PXM", packed.astype(columns.dtype), each)
    return out.sum(0).T.astype(columns.dtype)
