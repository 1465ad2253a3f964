"""Linear layer in FP8: three matmuls with operands in E4M3 (section 3.3.2 of the report).

    out = x w               x in tiles 1x128 along K          w in blocks 128x128
    d_x = d_out w^T         d_out in tiles 1x128 along N      the same blocks
    d_w = x^T d_out         both in tiles 1x128 along M       float32

M tokens, K input width, N output width. x and d_out are quantised twice, along each of their
axes, both times from the array itself. Backward keeps the tiles of x along M: one FP8 copy.

This form dequantises operands and multiplies them in their compute dtype. With power-of-two scales
that is bfloat16 and exact: an E4M3 value has 4 significant bits, a scale only moves its exponent,
so the product fits in the 8 bits of a bfloat16; and two such numbers multiply to 8 bits, exact in
float32. What is left of the error is that of summing K numbers in float32. Other scales need
float32 operands, with one rounding to 24 bits in each.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.precision.einsum import exact_einsum, row_product
from deepseek_jax.precision.fp8_tiles import Tiles, dequantise_tiles, quantise_tiles
from deepseek_jax.precision.fp8_weights import Fp8Weight
from deepseek_jax.precision.scopes import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT


def operand_dtype(power_of_two: bool) -> jnp.dtype:
    """Dtype that holds dequantised operands."""
    return jnp.dtype(jnp.bfloat16 if power_of_two else jnp.float32)


def einsum(subscripts: str, x: jax.Array, weight: Fp8Weight, *, power_of_two: bool) -> jax.Array:
    """Contraction of x with a weight, in the dtype of x.

    Args:
      subscripts: two operands. The letters that both have are summed over, and stand first in the
        weight; the result has the letters of x that are left, then those of the weight.

    Raises:
      ValueError: other subscripts.
    """
    of_x, of_weight, of_out = subscripts.replace("->", ",").split(",")
    inner = "".join(letter for letter in of_weight if letter in of_x)
    rows = "".join(letter for letter in of_x if letter not in inner)
    if not of_weight.startswith(inner) or of_out != rows + of_weight[len(inner) :]:
        raise ValueError(
            f"{subscripts} is no linear layer: FP8 weights multiply from the right, their summed "
            "letters first; compute this product with precision.recipe=bfloat16"
        )
    if of_x != rows + inner:
        x = jnp.einsum(f"{of_x}->{rows}{inner}", x)
    out_shape = (*x.shape[: len(rows)], *weight.shape[len(inner) :])
    depth = math.prod(x.shape[len(rows) :])
    out = _matmul(x.reshape(-1, depth), weight, power_of_two)
    return out.reshape(out_shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
@jax.named_scope(FORWARD)
def _matmul(x: jax.Array, weight: Fp8Weight, power_of_two: bool) -> jax.Array:
    """MK times a weight of K rows -> MN, in the dtype of x."""
    dtype = operand_dtype(power_of_two)
    tiles = dequantise_tiles(quantise_tiles(x, power_of_two=power_of_two), dtype)
    matrix = weight.dequantised(x.shape[1], dtype)
    return exact_einsum("MK,KN->MN", tiles, matrix).astype(x.dtype)


# Tiles of x along M, an empty array of the dtype of x, the weight.
_Kept = tuple[Tiles, jax.Array, Fp8Weight]


def _forward(x: jax.Array, weight: Fp8Weight, power_of_two: bool) -> tuple[jax.Array, _Kept]:
    tiles = quantise_tiles(x, power_of_two=power_of_two, axis=-2)
    like = jnp.zeros((0,), x.dtype)
    kept = kept_weight(weight)
    # A checkpoint would save the carrier as an argument of this product.
    bare = Fp8Weight(weight.values, weight.scales)
    return _matmul(x, bare, power_of_two), (tiles, like, kept)


def kept_weight(weight: Fp8Weight) -> Fp8Weight:
    """The weight for backward; an empty array stands for its carrier, which is not kept."""
    carrier = None if weight.carrier is None else jnp.zeros((0,), jnp.float32)
    return Fp8Weight(weight.values, weight.scales, carrier)


def _backward(power_of_two: bool, kept: _Kept, d_out: jax.Array) -> tuple[Any, Any]:
    tiles, like, weight = kept
    matrix = weight.dequantised(tiles.values.shape[1], operand_dtype(power_of_two))
    d_x = input_gradient(d_out, matrix, power_of_two)
    d_weight = None
    if weight.carrier is not None:
        d_weight = weight_gradient(tiles, d_out, power_of_two).reshape(weight.shape)
    nothing: Any = None
    return d_x.astype(like.dtype), Fp8Weight(nothing, nothing, d_weight)


_matmul.defvjp(_forward, _backward)


@jax.named_scope(INPUT_GRADIENT)
def input_gradient(d_out: jax.Array, matrix: jax.Array, power_of_two: bool) -> jax.Array:
    """d_out w^T: MN, in tiles along N, and w KN -> MK float32."""
    tiles = dequantise_tiles(quantise_tiles(d_out, power_of_two=power_of_two), matrix.dtype)
    return exact_einsum("MN,KN->MK", tiles, matrix)


@jax.named_scope(WEIGHT_GRADIENT)
def weight_gradient(tiles: Tiles, d_out: jax.Array, power_of_two: bool) -> jax.Array:
    """x^T d_out: tiles of x MK along M, and MN -> KN float32."""
    dtype: DTypeLike = operand_dtype(power_of_two)
    x = dequantise_tiles(tiles, dtype)
    d_out = dequantise_tiles(quantise_tiles(d_out, power_of_two=power_of_two, axis=-2), dtype)
    return row_product("MK,MN->KN", x, d_out)
