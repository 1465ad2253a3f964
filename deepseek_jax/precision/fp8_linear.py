"""Linear layer in FP8: three matmuls with operands in E4M3 (section 3.3.2 of the report).

    out = x w               x in tiles 1x128 along K          w in blocks 128x128
    d_x = d_out w^T         d_out in tiles 1x128 along N      the same blocks
    d_w = x^T d_out         both in tiles 1x128 along M       float32

M tokens, K input width, N output width. x and d_out are quantised twice, along each of their
axes, both times from the array itself. Backward keeps the tiles of x along M: one FP8 copy.

On a Hopper GPU kernels multiply the operands as they are (`fp8_hopper`; the choice: `fp8_form`).
The portable form dequantises them and multiplies in their compute dtype. With power-of-two scales
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

from deepseek_jax.kernels.kernel_names import OUTER, PRODUCT
from deepseek_jax.precision import fp8_operands
from deepseek_jax.precision.einsum import exact_einsum, row_product
from deepseek_jax.precision.fp8_form import Fp8Form
from deepseek_jax.precision.fp8_hopper import takes
from deepseek_jax.precision.fp8_sources import Source, source_of
from deepseek_jax.precision.fp8_tiles import Tiles, dequantise_tiles
from deepseek_jax.precision.fp8_weights import Fp8Weight, bare
from deepseek_jax.precision.linear_input import LinearInput, numbers
from deepseek_jax.precision.scopes import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from deepseek_jax.precision.token_tiles import TokenTiles, in_rows


def operand_dtype(power_of_two: bool) -> jnp.dtype:
    """Dtype that holds dequantised operands."""
    return jnp.dtype(jnp.bfloat16 if power_of_two else jnp.float32)


def einsum(subscripts: str, x: LinearInput, weight: Fp8Weight, *, form: Fp8Form) -> jax.Array:
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
    array, source = numbers(x), None
    depth = math.prod(weight.shape[: len(inner)])
    if of_x == rows + inner:
        source = source_of(x, depth, form.power_of_two)
    else:
        array = jnp.einsum(f"{of_x}->{rows}{inner}", array)
    out_shape = (*array.shape[: len(rows)], *weight.shape[len(inner) :])
    out = _matmul(array.reshape(-1, depth), source, weight, form)
    return out.reshape(out_shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
@jax.named_scope(FORWARD)
def _matmul(x: jax.Array, source: Source | None, weight: Fp8Weight, form: Fp8Form) -> jax.Array:
    """MK times a weight of K rows -> MN, in the dtype of x, to which gradients of x go alone."""

    def portable(tiles: Tiles, weight: Fp8Weight) -> jax.Array:
        dtype = operand_dtype(form.power_of_two)
        matrix = weight.dequantised(depth, dtype)
        return exact_einsum("MK,KN->MN", dequantise_tiles(tiles, dtype), matrix).astype(x.dtype)

    depth = x.shape[1]
    kernel = functools.partial(form.hopper.product, dtype=x.dtype)
    product = form.choose(PRODUCT, portable, kernel, takes=takes(weight, depth))
    return product(fp8_operands.rows(x, form, source), bare(weight))


# Tiles of x along M, an empty array of the dtype of x, the weight.
_Kept = tuple[Tiles | TokenTiles, jax.Array, Fp8Weight]


def _forward(
    x: jax.Array, source: Source | None, weight: Fp8Weight, form: Fp8Form
) -> tuple[jax.Array, _Kept]:
    tiles = fp8_operands.tokens(x, form, source=source)
    like = jnp.zeros((0,), x.dtype)
    kept = kept_weight(weight)
    # A checkpoint would save the carrier as an argument of this product.
    return _matmul(x, source, bare(weight), form), (tiles, like, kept)


def kept_weight(weight: Fp8Weight) -> Fp8Weight:
    """The weight for backward; an empty array stands for its carrier, which is not kept."""
    carrier = None if weight.carrier is None else jnp.zeros((0,), jnp.float32)
    return Fp8Weight(weight.values, weight.scales, carrier)


def _backward(form: Fp8Form, kept: _Kept, d_out: jax.Array) -> tuple[Any, None, Any]:
    tiles, like, weight = kept
    trained = weight.carrier is not None
    rows, sent = (
        fp8_operands.both(d_out, form) if trained else (fp8_operands.rows(d_out, form), None)
    )
    d_x = _input_gradient(rows, weight, form, like.dtype)
    d_weight = None
    if sent is not None:
        d_weight = _weight_gradient(tiles, sent, d_out.shape[0], form).reshape(weight.shape)
    nothing: Any = None
    return d_x, None, Fp8Weight(nothing, nothing, d_weight)


_matmul.defvjp(_forward, _backward)


@jax.named_scope(INPUT_GRADIENT)
def _input_gradient(d_out: Tiles, weight: Fp8Weight, form: Fp8Form, result: DTypeLike) -> jax.Array:
    """d_out w^T: MN, in tiles along N, and w of K rows -> MK in the dtype `result`."""
    depth = weight.values.size // d_out.values.shape[1]

    def portable(tiles: Tiles, weight: Fp8Weight) -> jax.Array:
        dtype = operand_dtype(form.power_of_two)
        matrix = weight.dequantised(depth, dtype)
        return exact_einsum("MN,KN->MK", dequantise_tiles(tiles, dtype), matrix).astype(result)

    kernel = functools.partial(form.hopper.input_gradient, dtype=result)
    product = form.choose(PRODUCT, portable, kernel, takes=takes(weight, depth))
    return product(d_out, bare(weight))


@jax.named_scope(WEIGHT_GRADIENT)
def _weight_gradient(
    x: Tiles | TokenTiles, d_out: Tiles | TokenTiles, count: int, form: Fp8Form
) -> jax.Array:
    """x^T d_out: MK and MN of M = `count` rows, both in tiles along M -> KN float32."""

    def portable(x: Tiles | TokenTiles, d_out: Tiles | TokenTiles) -> jax.Array:
        dtype = operand_dtype(form.power_of_two)
        left, right = (dequantise_tiles(in_rows(tiles, count), dtype) for tiles in (x, d_out))
        return row_product("MK,MN->KN", left, right)

    transposed = isinstance(x, TokenTiles) and isinstance(d_out, TokenTiles)
    product = form.choose(OUTER, portable, form.hopper.weight_gradient, takes=transposed)
    return product(x, d_out)
