"""Recipes that leave out one part of the FP8 recipe, for `bench precision` alone.

TENSOR_SCALES has one free scale for each operand of a product, which is a token matrix, or the
weight of one linear layer or expert. Scales of tiles and blocks are left out.

SHORT_SUMS has the scales of the recipe, and sums as short as those of Hopper's tensor cores, over
the whole contraction: products of 32 neighbours are summed exactly, and the running sum keeps 13
fraction bits, cut toward zero, after each addition (section 3.3.2 of the report: about 14 bits).
The promotion to float32 after each 128 is left out. The scales, powers of two, are applied to the
operands, so that the sum is that of a kernel which moves its exponent from tile to tile.

Values are rounded to E4M3 as in the recipe, and multiplied in float32.

M rows, K summed, N width out, E experts.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.precision import fp8_tiles, grouped
from deepseek_jax.precision.einsum import exact_einsum
from deepseek_jax.precision.expert_tiles import dequantise_rows, quantise_rows
from deepseek_jax.precision.fp8_weights import Linear, quantise_blocks
from deepseek_jax.precision.grouped import Plan
from deepseek_jax.precision.linear_input import LinearInput, numbers
from deepseek_jax.precision.recipes import Recipe

NEIGHBOURS = 32  # products that a tensor core adds at once
FRACTION_BITS = 13  # of the sums of a tensor core; the leading bit is the fourteenth


class TensorScales:
    """A scale for each operand, and sums in float32."""

    def matrix(self, x: jax.Array, axis: int) -> jax.Array:
        """A token matrix in E4M3, as float32; `axis` is summed over."""
        return whole(x, tuple(range(x.ndim)))

    def rows(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        """Rows sorted by expert that are summed over, in E4M3, as float32."""
        return self.matrix(x, 0)

    def weight(self, x: jax.Array) -> jax.Array:
        """KN or EKN in E4M3, as float32."""
        return whole(x, (-2, -1))

    def add(self, total: jax.Array, part: jax.Array) -> jax.Array:
        """A sum of float32 numbers."""
        return total + part

    step: int | None = None  # numbers that are summed before `add`; None for all


class ShortSums(TensorScales):
    """Scales of tiles and blocks, and sums that keep `FRACTION_BITS`."""

    step = NEIGHBOURS

    def matrix(self, x: jax.Array, axis: int) -> jax.Array:
        tiles = fp8_tiles.quantise_tiles(x, power_of_two=True, axis=axis)
        return fp8_tiles.dequantise_tiles(tiles, jnp.float32)

    def rows(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        tiles = quantise_rows(x, sizes, True)
        return dequantise_rows(tiles, sizes, jnp.float32)

    def weight(self, x: jax.Array) -> jax.Array:
        linear = Linear.whole("-" * (x.ndim - 2) + "io", x.shape)
        blocks = quantise_blocks(x, linear, power_of_two=True)
        return blocks.dequantised(x.shape[-2], jnp.float32).reshape(x.shape)

    def add(self, total: jax.Array, part: jax.Array) -> jax.Array:
        return cut(total + part)


def whole(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """x rounded to E4M3 under one free scale over `axes`, float32."""
    x = x.astype(jnp.float32)
    scale = fp8_tiles.scales_of(jnp.abs(x).max(axes, keepdims=True), False)
    values = fp8_tiles.quantised(x, jnp.broadcast_to(scale, x.shape), False)
    return values.astype(jnp.float32) * scale


def cut(x: jax.Array) -> jax.Array:
    """float32 numbers with all but `FRACTION_BITS` of their fraction cut off; NaN stays NaN."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    kept = bits & jnp.uint32((0xFFFFFFFF << (23 - FRACTION_BITS)) & 0xFFFFFFFF)
    return jnp.where(jnp.isnan(x), x, lax.bitcast_convert_type(kept, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Ablation(Recipe):
    """FP8 linear layers whose weights are quantised at each use, from float32.

    Attributes:
      form: scales and sums.
    """

    form: TensorScales = dataclasses.field(default_factory=TensorScales)

    def prepare(
        self, weight: jax.Array, *, sensitive: bool, linear: Linear | None = None
    ) -> jax.Array:
        """The master of a linear layer's weight; other weights as in bfloat16."""
        return weight if sensitive or linear is not None else weight.astype(self.activation_dtype)

    def einsum(self, subscripts: str, x: LinearInput, weight: Any) -> jax.Array:
        """Linear layer: the summed letters are the first of the weight."""
        of_x, of_weight, _ = subscripts.replace("->", ",").split(",")
        inner = "".join(letter for letter in of_weight if letter in of_x)
        rows = "".join(letter for letter in of_x if letter not in inner)
        array = jnp.einsum(f"{of_x}->{rows}{inner}", numbers(x).astype(self.activation_dtype))
        depth = math.prod(array.shape[len(rows) :])
        out = _linear(array.reshape(-1, depth), weight.reshape(depth, -1), self.form)
        return out.reshape(*array.shape[: len(rows)], *weight.shape[len(inner) :])

    def grouped(self, rows: LinearInput, weight: Any, sizes: jax.Array, likely: int) -> jax.Array:
        """Linear layers of all experts at once; arguments as in `grouped.grouped_matmul`."""
        array = numbers(rows).astype(self.activation_dtype)
        matrices = weight.reshape(weight.shape[0], array.shape[1], -1)
        plan = grouped.plan(array.shape[0], weight.shape[0], likely)
        return _grouped(array, matrices, sizes, plan, self.form)


TENSOR_SCALES = Ablation("fp8", jnp.dtype(jnp.bfloat16), form=TensorScales())
SHORT_SUMS = Ablation("fp8", jnp.dtype(jnp.bfloat16), form=ShortSums())


def _in_steps(form: TensorScales, product: Any, size: int) -> jax.Array:
    """Sum of product(start, stop) over steps of [0, size)."""
    step = form.step or size
    total = product(0, min(step, size))
    for start in range(step, size, step):
        total = form.add(total, product(start, min(start + step, size)))
    return total if form.step is None else form.add(total, jnp.zeros_like(total))


def _product(form: TensorScales, a: jax.Array, b: jax.Array) -> jax.Array:
    """MK times KN -> MN float32."""
    return _in_steps(
        form, lambda i, j: exact_einsum("MK,KN->MN", a[:, i:j], b[i:j]), a.shape[1]
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: jax.Array, weight: jax.Array, form: TensorScales) -> jax.Array:
    return _product(form, form.matrix(x, -1), form.weight(weight)).astype(x.dtype)


def _linear_forward(x: jax.Array, weight: jax.Array, form: TensorScales) -> tuple[jax.Array, Any]:
    return _linear(x, weight, form), (x, weight)


def _linear_backward(
    form: TensorScales, saved: Any, d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    d_x = _product(form, form.matrix(d_out, -1), form.weight(weight).T)
    d_weight = _product(form, form.matrix(x, -2).T, form.matrix(d_out, -2))
    return d_x.astype(x.dtype), d_weight


_linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(
    rows: jax.Array, weight: jax.Array, sizes: jax.Array, plan: Plan, form: TensorScales
) -> jax.Array:
    a, b = form.matrix(rows, -1), form.weight(weight)
    out = _in_steps(
        form, lambda i, j: plan.product(a[:, i:j], b[:, i:j], sizes), rows.shape[1]
    )  # fmt: skip
    return out.astype(rows.dtype)


def _grouped_forward(
    rows: jax.Array, weight: jax.Array, sizes: jax.Array, plan: Plan, form: TensorScales
) -> tuple[jax.Array, Any]:
    return _grouped(rows, weight, sizes, plan, form), (rows, weight, sizes)


def _grouped_backward(
    plan: Plan, form: TensorScales, saved: Any, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows, weight, sizes = saved
    sent, matrices = form.matrix(d_out, -1), form.weight(weight)

    def to_rows(i: int, j: int) -> jax.Array:
        return plan.rows_gradient((rows, matrices[..., i:j], sizes), sent[:, i:j])

    d_rows = _in_steps(form, to_rows, weight.shape[2]).astype(rows.dtype)
    a, b = form.rows(rows, sizes), form.rows(d_out, sizes)
    if form.step is None:
        d_weight = plan.weight_gradient((a, weight, sizes), b, weight.shape, jnp.float32)
    else:
        d_weight = _short_weight_gradient(form, a, b, sizes)
    return d_rows, d_weight, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _short_weight_gradient(
    form: TensorScales, a: jax.Array, b: jax.Array, sizes: jax.Array
) -> jax.Array:
    """Sums of a MK times b MN over the rows of each expert, in steps -> EKN."""
    step = form.step or 1
    first = jnp.cumsum(sizes) - sizes

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        place = i * step + jnp.arange(step, dtype=sizes.dtype)[None]
        row = jnp.minimum(first[:, None] + place, a.shape[0] - 1)  # E(step)
        own = jnp.where((place < sizes[:, None])[..., None], a[row], 0)
        return form.add(total, exact_einsum("EJK,EJN->EKN", own, b[row]))

    start = jnp.zeros((sizes.shape[0], a.shape[1], b.shape[1]), jnp.float32)
    return lax.fori_loop(0, (sizes.max() + step - 1) // step, add, start)
