"""Grouped matmul in FP8: the linear layers of all experts, as `fp8_linear` has one.

M rows, D width in, F width out, E experts, T tiles. Tiles along the rows are those of
`expert_tiles`: each holds rows of one expert alone.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.kernels.kernel_names import OUTER, PRODUCT
from deepseek_jax.precision import fp8_operands, grouped
from deepseek_jax.precision.expert_tiles import dequantise_rows
from deepseek_jax.precision.fp8_form import Fp8Form
from deepseek_jax.precision.fp8_hopper import takes
from deepseek_jax.precision.fp8_linear import kept_weight, operand_dtype
from deepseek_jax.precision.fp8_sources import Source, source_of
from deepseek_jax.precision.fp8_tiles import Tiles, dequantise_tiles
from deepseek_jax.precision.fp8_weights import Fp8Weight, bare
from deepseek_jax.precision.grouped import Plan
from deepseek_jax.precision.linear_input import (
    LinearInput,
    TiledArray,
    numbers,
    with_tiled_gradient,
)
from deepseek_jax.precision.scopes import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from deepseek_jax.precision.token_tiles import TokenTiles, in_rows


def grouped_matmul(
    rows: LinearInput, weight: Fp8Weight, sizes: jax.Array, *, likely: int, form: Fp8Form
) -> jax.Array:
    """`grouped.grouped_matmul` in FP8: rows MD, in tiles along D, times the weight EDF -> MF."""
    return numbers(_of_input(rows, weight, sizes, likely, form, False))


def for_message(
    rows: LinearInput, weight: Fp8Weight, sizes: jax.Array, *, likely: int, form: Fp8Form
) -> TiledArray:
    """`grouped_matmul`, whose gradient is a `TiledArray`: see `Recipe.grouped_for_message`."""
    out = _of_input(rows, weight, sizes, likely, form, True)
    assert isinstance(out, TiledArray)
    return out


def _of_input(
    rows: LinearInput,
    weight: Fp8Weight,
    sizes: jax.Array,
    likely: int,
    form: Fp8Form,
    tiled_gradient: bool,
) -> jax.Array | TiledArray:
    array = numbers(rows)
    source = source_of(rows, array.shape[1], form.power_of_two)
    plan = grouped.plan(array.shape[0], weight.shape[0], likely)
    return _grouped(array, source, weight, sizes, plan, form, tiled_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
@jax.named_scope(FORWARD)
def _grouped(
    rows: jax.Array,
    source: Source | None,
    weight: Fp8Weight,
    sizes: jax.Array,
    plan: Plan,
    form: Fp8Form,
    tiled_gradient: bool,
) -> jax.Array | TiledArray:
    """The product, in the dtype of the rows, to which their gradient goes alone."""

    def portable(tiles: Tiles, weight: Fp8Weight, sizes: jax.Array) -> jax.Array:
        dtype = operand_dtype(form.power_of_two)
        matrices = weight.dequantised(depth, dtype)
        return plan.product(dequantise_tiles(tiles, dtype), matrices, sizes).astype(rows.dtype)

    depth = rows.shape[1]
    kernel = functools.partial(form.hopper.product, dtype=rows.dtype)
    product = form.choose(PRODUCT, portable, kernel, takes=takes(weight, depth))
    out = product(fp8_operands.rows(rows, form, source), bare(weight), sizes)
    return with_tiled_gradient(out) if tiled_gradient else out


# Tiles of the rows along M, an empty array of their dtype, the weight, and the sizes.
_Kept = tuple[Tiles | TokenTiles, jax.Array, Fp8Weight, jax.Array]


def _forward(
    rows: jax.Array,
    source: Source | None,
    weight: Fp8Weight,
    sizes: jax.Array,
    plan: Plan,
    form: Fp8Form,
    tiled_gradient: bool,
) -> tuple[jax.Array | TiledArray, _Kept]:
    tiles = fp8_operands.tokens(rows, form, sizes, source)
    like = jnp.zeros((0,), rows.dtype)
    # As in `fp8_linear`.
    out = _grouped(rows, source, bare(weight), sizes, plan, form, tiled_gradient)
    return out, (tiles, like, kept_weight(weight), sizes)


def _backward(
    plan: Plan, form: Fp8Form, tiled_gradient: bool, kept: _Kept, d_out: jax.Array | TiledArray
) -> tuple[jax.Array, None, Fp8Weight, None]:
    tiles, like, weight, sizes = kept
    d_rows = _input_gradient(d_out, weight, sizes, plan, form, like.dtype)
    d_weight, nothing = None, cast(Any, None)
    if weight.carrier is not None:
        d_weight = _weight_gradient(tiles, d_out, weight, sizes, plan, form)
    return d_rows, None, Fp8Weight(nothing, nothing, d_weight), None


_grouped.defvjp(_forward, _backward)


@jax.named_scope(INPUT_GRADIENT)
def _input_gradient(
    d_out: jax.Array | TiledArray,
    weight: Fp8Weight,
    sizes: jax.Array,
    plan: Plan,
    form: Fp8Form,
    result: DTypeLike,
) -> jax.Array:
    """d_out w^T for the expert of each row: MF, in tiles along F -> MD in the dtype `result`."""
    array, source = _array_and_source(d_out, form)
    depth = weight.values.size // (sizes.shape[0] * array.shape[1])

    def portable(tiles: Tiles, weight: Fp8Weight, sizes: jax.Array) -> jax.Array:
        dtype = operand_dtype(form.power_of_two)
        sent = dequantise_tiles(tiles, dtype)
        saved = sent, weight.dequantised(depth, dtype), sizes
        return plan.rows_gradient(saved, sent).astype(result)

    kernel = functools.partial(form.hopper.input_gradient, dtype=result)
    product = form.choose(PRODUCT, portable, kernel, takes=takes(weight, depth))
    return product(fp8_operands.rows(array, form, source), bare(weight), sizes)


@jax.named_scope(WEIGHT_GRADIENT)
def _weight_gradient(
    x: Tiles | TokenTiles,
    d_out: jax.Array | TiledArray,
    weight: Fp8Weight,
    sizes: jax.Array,
    plan: Plan,
    form: Fp8Form,
) -> jax.Array:
    """x^T d_out for each expert: tiles of x MD along M, and MF -> float32, as the weight EDF is."""
    array, source = _array_and_source(d_out, form)
    (count, width), experts = array.shape, sizes.shape[0]
    depth = weight.values.size // (experts * width)
    sent = fp8_operands.tokens(array, form, sizes, source)

    def portable(x: Tiles | TokenTiles, d_out: Tiles | TokenTiles, sizes: jax.Array) -> jax.Array:
        dtype = operand_dtype(form.power_of_two)
        left, right = (
            dequantise_rows(in_rows(tiles, count, sizes), sizes, dtype) for tiles in (x, d_out)
        )
        saved = left, jnp.zeros((0,), dtype), sizes
        return plan.weight_gradient(saved, right, (experts, depth, width), jnp.float32)

    transposed = isinstance(x, TokenTiles) and isinstance(sent, TokenTiles)
    product = form.choose(OUTER, portable, form.hopper.weight_gradient, takes=transposed)
    return product(x, sent, sizes).reshape(weight.shape)


def _array_and_source(
    d_out: jax.Array | TiledArray, form: Fp8Form
) -> tuple[jax.Array, Source | None]:
    array = numbers(d_out)
    return array, source_of(d_out, array.shape[1], form.power_of_two)
