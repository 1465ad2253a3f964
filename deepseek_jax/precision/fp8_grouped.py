"""Grouped matmul in FP8: the linear layers of all experts, as `fp8_linear` has one.

M rows, D width in, F width out, E experts, T tiles. Tiles along the rows are those of
`expert_tiles`: each holds rows of one expert alone.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.kernels.names import OUTER, PRODUCT
from deepseek_jax.precision import grouped
from deepseek_jax.precision.expert_tiles import rows_of_tiles, tile_of_row
from deepseek_jax.precision.fp8_form import Fp8Form
from deepseek_jax.precision.fp8_hopper import takes
from deepseek_jax.precision.fp8_linear import kept_weight, operand_dtype
from deepseek_jax.precision.fp8_tiles import (
    Tiles,
    as_floats,
    as_integers,
    dequantise_tiles,
    quantise_tiles,
    quantised,
    scales_of,
)
from deepseek_jax.precision.fp8_weights import Fp8Weight, bare
from deepseek_jax.precision.grouped import Plan
from deepseek_jax.precision.scopes import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT


def grouped_matmul(
    rows: jax.Array, weight: Fp8Weight, sizes: jax.Array, *, likely: int, form: Fp8Form
) -> jax.Array:
    """`grouped.grouped_matmul` in FP8: rows MD, in tiles along D, times the weight EDF -> MF."""
    plan = grouped.plan(rows.shape[0], weight.shape[0], likely)
    return _grouped(rows, weight, sizes, plan, form)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
@jax.named_scope(FORWARD)
def _grouped(
    rows: jax.Array, weight: Fp8Weight, sizes: jax.Array, plan: Plan, form: Fp8Form
) -> jax.Array:
    def portable(tiles: Tiles, weight: Fp8Weight, sizes: jax.Array) -> jax.Array:
        dtype = operand_dtype(form.power_of_two)
        matrices = weight.dequantised(depth, dtype)
        return plan.product(dequantise_tiles(tiles, dtype), matrices, sizes).astype(rows.dtype)

    depth = rows.shape[1]
    kernel = functools.partial(form.hopper.product, dtype=rows.dtype)
    product = form.choose(PRODUCT, portable, kernel, takes=takes(weight, depth))
    return product(quantise_tiles(rows, power_of_two=form.power_of_two), bare(weight), sizes)


# Tiles of the rows along M, an empty array of their dtype, the weight, and the sizes.
_Kept = tuple[Tiles, jax.Array, Fp8Weight, jax.Array]


def _forward(
    rows: jax.Array, weight: Fp8Weight, sizes: jax.Array, plan: Plan, form: Fp8Form
) -> tuple[jax.Array, _Kept]:
    tiles = quantise_rows(rows, sizes, form.power_of_two)
    like = jnp.zeros((0,), rows.dtype)
    out = _grouped(rows, bare(weight), sizes, plan, form)  # as in `fp8_linear`
    return out, (tiles, like, kept_weight(weight), sizes)


def _backward(plan: Plan, form: Fp8Form, kept: _Kept, d_out: jax.Array) -> tuple[Any, Any, None]:
    tiles, like, weight, sizes = kept
    d_rows = _input_gradient(d_out, weight, sizes, tiles.values.shape[1], plan, form, like.dtype)
    d_weight, nothing = None, cast(Any, None)
    if weight.carrier is not None:
        d_weight = _weight_gradient(tiles, d_out, sizes, plan, form).reshape(weight.shape)
    return d_rows, Fp8Weight(nothing, nothing, d_weight), None


_grouped.defvjp(_forward, _backward)


@jax.named_scope(INPUT_GRADIENT)
def _input_gradient(
    d_out: jax.Array,
    weight: Fp8Weight,
    sizes: jax.Array,
    depth: int,
    plan: Plan,
    form: Fp8Form,
    result: DTypeLike,
) -> jax.Array:
    """d_out w^T for the expert of each row: MF, in tiles along F -> MD in the dtype `result`."""

    def portable(tiles: Tiles, weight: Fp8Weight, sizes: jax.Array) -> jax.Array:
        dtype = operand_dtype(form.power_of_two)
        sent = dequantise_tiles(tiles, dtype)
        saved = sent, weight.dequantised(depth, dtype), sizes
        return plan.rows_gradient(saved, sent).astype(result)

    kernel = functools.partial(form.hopper.input_gradient, dtype=result)
    product = form.choose(PRODUCT, portable, kernel, takes=takes(weight, depth))
    return product(quantise_tiles(d_out, power_of_two=form.power_of_two), bare(weight), sizes)


@jax.named_scope(WEIGHT_GRADIENT)
def _weight_gradient(
    tiles: Tiles, d_out: jax.Array, sizes: jax.Array, plan: Plan, form: Fp8Form
) -> jax.Array:
    """x^T d_out for each expert: tiles of x MD along M, and MF -> EDF float32."""
    shape = sizes.shape[0], tiles.values.shape[1], d_out.shape[1]

    def portable(x: Tiles, d_out: Tiles, sizes: jax.Array) -> jax.Array:
        dtype = operand_dtype(form.power_of_two)
        saved = dequantise_rows(x, sizes, dtype), jnp.zeros((0,), dtype), sizes
        sent = dequantise_rows(d_out, sizes, dtype)
        return plan.weight_gradient(saved, sent, shape, jnp.float32)

    product = form.choose(OUTER, portable, form.hopper.grouped_weight_gradient)
    return product(tiles, quantise_rows(d_out, sizes, form.power_of_two), sizes)


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
    tile, real = tile_of_row(count, sizes)
    values = quantised(jnp.where(real, x, 0), _of_rows(scales, tile), power_of_two)
    return Tiles(values, scales)


def dequantise_rows(tiles: Tiles, sizes: jax.Array, dtype: Any) -> jax.Array:
    """The rows MD of `quantise_rows`, in `dtype`."""
    tile, _ = tile_of_row(tiles.values.shape[0], sizes)
    return (tiles.values.astype(jnp.float32) * _of_rows(tiles.scales, tile)).astype(dtype)


def _of_rows(scales: jax.Array, tile: jax.Array) -> jax.Array:
    return scales.at[tile].get(mode="promise_in_bounds")
