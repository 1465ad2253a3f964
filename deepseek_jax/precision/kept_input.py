"""Inputs that backward keeps as FP8 tiles, while forward computes with the inputs themselves.

The tiles are those of 128 channels of one token, with power-of-two scales (section 3.3.3 of the
report), under the name of the residual, so that a recompute policy can save them: a byte for each
number, and one for the exponent of each tile's scale. What follows from
the input, such as SwiGLU's output or the tiles along tokens that the gradient of a weight
multiplies, is computed again in backward from the kept tiles.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax.precision import fp8_operands, weight_gradients
from deepseek_jax.precision.fp8_form import Fp8Form
from deepseek_jax.precision.fp8_tiles import Tiles, dequantise_tiles, exponents, scales_from
from deepseek_jax.precision.fp8_weights import Fp8Weight
from deepseek_jax.precision.linear_input import TiledArray
from deepseek_jax.precision.saved import Saved, save

# Output of a linear layer, given its input, its weight, and other arrays.
Layer = Callable[..., Any]


def from_fp8_input(
    name: Saved, layer: Layer, form: Fp8Form, x: jax.Array, weight: Fp8Weight, *rest: jax.Array
) -> Any:
    """layer(x, weight, *rest), of whose x backward has only FP8 tiles.

    Args:
      name: of the residual.
      layer: closes over no array. In backward it gets a `TiledArray` for x.
      form: of the quantisation, with power-of-two scales.
      x: ...D, in tiles of 128 along D. A NaN or an infinity makes its whole tile NaN in backward.
      rest: arrays of any dtype, which backward keeps as they are.
    """
    trained = weight.carrier is not None
    dtype = x.dtype

    @jax.custom_vjp
    def run(x: jax.Array, weight: Fp8Weight, rest: Any) -> Any:
        return layer(x, weight, *rest)

    def forward(x: jax.Array, weight: Fp8Weight, rest: Any) -> tuple[Any, Any]:
        tiles = fp8_operands.rows(x, form)
        kept = save(name, (tiles.values, exponents(tiles.scales)))
        bare = dataclasses.replace(weight, carrier=None)
        return layer(x, bare, *rest), (kept, bare, rest)

    def backward(kept: Any, d_out: Any) -> tuple[Any, Any, Any]:
        (values, bytes_of_scales), weight, rest = kept
        tiles = Tiles(values, scales_from(bytes_of_scales))
        again = dequantise_tiles(tiles, dtype)

        def from_tiles(weight: Fp8Weight, x: jax.Array, *rest: jax.Array) -> Any:
            return layer(TiledArray(x, tiles), weight, *rest)

        if not trained:
            d_x, *d_rest = jax.vjp(functools.partial(from_tiles, weight), again, *rest)[1](d_out)
            return d_x, None, tuple(d_rest)
        pull = weight_gradients.vjp(from_tiles, weight, again, *rest)[1]
        d_weight, d_x, *d_rest = pull(d_out)
        return d_x, weight_gradients.cotangents(weight, d_weight), tuple(d_rest)

    run.defvjp(forward, backward)
    return run(x, weight, rest)
