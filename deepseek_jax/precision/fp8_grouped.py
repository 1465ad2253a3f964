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
from deepseek_jax.precision.fp8_tiles import Tiles, dequantise_tiles
from deepseek_jax.precision.fp8_weights import Fp8Weight, bare
from deepseek_jax.precision.grouped import Plan
from deepseek_jax.precision.scopes import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from deepseek_jax.precision.token_tiles import TokenTiles, in_rows


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
    return product(fp8_operands.rows(rows, form), bare(weight), sizes)


# Tiles of the rows along M, an empty array of their dtype, the weight, and the sizes.
_Kept = tuple[Tiles | TokenTiles, jax.Array, Fp8Weight, jax.Array]


def _forward(
    rows: jax.Array, weight: Fp8Weight, sizes: jax.Array, plan: Plan, form: Fp8Form
) -> tuple[jax.Array, _Kept]:
    tiles = fp8_operands.tokens(rows, form, sizes)
    like = jnp.zeros((0,), rows.dtype)
    out = _grouped(rows, bare(weight), sizes, plan, form)  # as in `fp8_linear`
    return out, (tiles, like, kept_weight(weight), sizes)


def _backward(plan: Plan, form: Fp8Form, kept: _Kept, d_out: jax.Array) -> tuple[Any, Any, None]:
    tiles, like, weight, sizes = kept
    d_rows = _input_gradient(d_out, weight, sizes, plan, form, like.dtype)
    d_weight, nothing = None, cast(Any, None)
    if weight.carrier is not None:
        depth = weight.values.size // (sizes.shape[0] * d_out.shape[1])
        d_weight = _weight_gradient(tiles, d_out, sizes, depth, plan, form).reshape(weight.shape)
    return d_rows, Fp8Weight(nothing, nothing, d_weight), None


_grouped.defvjp(_forward, _backward)


@jax.named_scope(INPUT_GRADIENT)
def _input_gradient(
    d_out: jax.Array,
    weight: Fp8Weight,
    sizes: jax.Array,
    plan: Plan,
    form: Fp8Form,
    result: DTypeLike,
) -> jax.Array:
    """d_out w^T for the expert of each row: MF, in tiles along F -> MD in the dtype `result`."""
    depth = weight.values.size // (sizes.shape[0] * d_out.shape[1])

    def portable(tiles: Tiles, weight: Fp8Weight, sizes: jax.Array) -> jax.Array:
        dtype = operand_dtype(form.power_of_two)
        sent = dequantise_tiles(tiles, dtype)
        saved = sent, weight.dequantised(depth, dtype), sizes
        return plan.rows_gradient(saved, sent).astype(result)

    kernel = functools.partial(form.hopper.input_gradient, dtype=result)
    product = form.choose(PRODUCT, portable, kernel, takes=takes(weight, depth))
    return product(fp8_operands.rows(d_out, form), bare(weight), sizes)


@jax.named_scope(WEIGHT_GRADIENT)
def _weight_gradient(
    x: Tiles | TokenTiles,
    d_out: jax.Array,
    sizes: jax.Array,
    depth: int,
    plan: Plan,
    form: Fp8Form,
) -> jax.Array:
    """x^T d_out for each expert: tiles of x MD along M, D = `depth`, and MF -> EDF float32."""
    count, width = d_out.shape
    sent = fp8_operands.tokens(d_out, form, sizes)

    def portable(x: Tiles | TokenTiles, d_out: Tiles | TokenTiles, sizes: jax.Array) -> jax.Array:
        dtype = operand_dtype(form.power_of_two)
        left, right = (
            dequantise_rows(in_rows(tiles, count, sizes), sizes, dtype) for tiles in (x, d_out)
        )
        saved = left, jnp.zeros((0,), dtype), sizes
        return plan.weight_gradient(saved, right, (sizes.shape[0], depth, width), jnp.float32)

    transposed = isinstance(x, TokenTiles) and isinstance(sent, TokenTiles)
    product = form.choose(OUTER, portable, form.hopper.weight_gradient, takes=transposed)
    return product(x, sent, sizes)
