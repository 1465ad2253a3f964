"""Grouped matmul in FP8: the linear layers of all experts, as `fp8_linear` has one.

M rows, D width in, F width out, E experts, T tiles. A tile along the rows holds up to 128 rows of
one expert: the first begins with the expert's first row, the last may be shorter.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from deepseek_jax.precision import grouped
from deepseek_jax.precision.fp8_linear import kept_weight, operand_dtype
from deepseek_jax.precision.fp8_tiles import (
    BLOCK,
    Tiles,
    as_floats,
    as_integers,
    dequantise_tiles,
    quantise_tiles,
    quantised,
    scales_of,
)
from deepseek_jax.precision.fp8_weights import Fp8Weight
from deepseek_jax.precision.grouped import Plan
from deepseek_jax.precision.scopes import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT


def grouped_matmul(
    rows: jax.Array, weight: Fp8Weight, sizes: jax.Array, *, likely: int, power_of_two: bool
) -> jax.Array:
    """`grouped.grouped_matmul` in FP8: rows MD, in tiles along D, times the weight EDF -> MF."""
    plan = grouped.plan(rows.shape[0], weight.shape[0], likely)
    return _grouped(rows, weight, sizes, plan, power_of_two)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
@jax.named_scope(FORWARD)
def _grouped(
    rows: jax.Array, weight: Fp8Weight, sizes: jax.Array, plan: Plan, power_of_two: bool
) -> jax.Array:
    dtype = operand_dtype(power_of_two)
    tiles = dequantise_tiles(quantise_tiles(rows, power_of_two=power_of_two), dtype)
    matrices = weight.dequantised(rows.shape[1], dtype)
    return plan.product(tiles, matrices, sizes).astype(rows.dtype)


# Tiles of the rows along M, an empty array of their dtype, the weight, and the sizes.
_Kept = tuple[Tiles, jax.Array, Fp8Weight, jax.Array]


def _forward(
    rows: jax.Array, weight: Fp8Weight, sizes: jax.Array, plan: Plan, power_of_two: bool
) -> tuple[jax.Array, _Kept]:
    tiles = quantise_rows(rows, sizes, power_of_two)
    like = jnp.zeros((0,), rows.dtype)
    bare = Fp8Weight(weight.values, weight.scales)  # as in `fp8_linear`
    out = _grouped(rows, bare, sizes, plan, power_of_two)
    return out, (tiles, like, kept_weight(weight), sizes)


def _backward(
    plan: Plan, power_of_two: bool, kept: _Kept, d_out: jax.Array
) -> tuple[Any, Any, None]:
    tiles, like, weight, sizes = kept
    dtype, depth = operand_dtype(power_of_two), tiles.values.shape[1]
    sent = dequantise_tiles(quantise_tiles(d_out, power_of_two=power_of_two), dtype)
    saved = sent, weight.dequantised(depth, dtype), sizes
    with jax.named_scope(INPUT_GRADIENT):
        d_rows = plan.rows_gradient(saved, sent).astype(like.dtype)
    d_weight, nothing = None, cast(Any, None)
    if weight.carrier is not None:
        saved = dequantise_rows(tiles, sizes, dtype), jnp.zeros((0,), dtype), sizes
        d_out = dequantise_rows(quantise_rows(d_out, sizes, power_of_two), sizes, dtype)
        shape = (weight.shape[0], depth, d_out.shape[1])
        with jax.named_scope(WEIGHT_GRADIENT):
            d_weight = plan.weight_gradient(saved, d_out, shape, jnp.float32)
        d_weight = d_weight.reshape(weight.shape)
    return d_rows, Fp8Weight(nothing, nothing, d_weight), None


_grouped.defvjp(_forward, _backward)


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
    tile, real = _tile_of_row(count, sizes)
    values = quantised(jnp.where(real, x, 0), _of_rows(scales, tile), power_of_two)
    return Tiles(values, scales)


def dequantise_rows(tiles: Tiles, sizes: jax.Array, dtype: Any) -> jax.Array:
    """The rows MD of `quantise_rows`, in `dtype`."""
    tile, _ = _tile_of_row(tiles.values.shape[0], sizes)
    return (tiles.values.astype(jnp.float32) * _of_rows(tiles.scales, tile)).astype(dtype)


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


def _most_tiles(rows: int, experts: int) -> int:
    """T: most tiles that so many rows of so many experts need."""
    return min(rows // BLOCK + experts, rows)


def _tile_ends(sizes: jax.Array) -> jax.Array:
    return jnp.cumsum((sizes + BLOCK - 1) // BLOCK)


def _tile_of_row(count: int, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tile of each row, M, and M1 whether the row is an expert's."""
    ends, last = jnp.cumsum(sizes), _tile_ends(sizes)
    number = jnp.arange(count, dtype=sizes.dtype)
    expert = jnp.minimum(jnp.searchsorted(ends, number, side="right"), sizes.shape[0] - 1)
    first = (last - (sizes + BLOCK - 1) // BLOCK)[expert]
    tile = first + (number - (ends - sizes)[expert]) // BLOCK
    most = _most_tiles(count, sizes.shape[0])
    return jnp.clip(tile, 0, most - 1), (number < ends[-1])[:, None]


def _of_rows(scales: jax.Array, tile: jax.Array) -> jax.Array:
    return scales.at[tile].get(mode="promise_in_bounds")
