"""Activations and weights in FP8, as the products of a linear layer take them.

M rows, D columns.

    rows      tiles of 128 columns: operands of products with a weight
    tokens    tiles of 128 rows: operands of the gradient of a weight
    both      of a gradient that is an operand of two products
    blocks    of a weight

A quantiser for Hopper makes them where `Fp8Form` chooses it, scales are powers of two and it takes
the array; else XLA does. Both make the same bits. Where the gradient of the weight has a kernel,
tiles of tokens are made transposed, as it reads them.

A `source` of x, of `fp8_sources.source_of`, spares writing x to memory. Tiles of x are its rows as
they are: quantised again they would hold the same numbers. Their tiles of tokens are made of them.
Of SwiGLU a quantiser makes rows alone; tiles of tokens are made in backward, where XLA computes
SwiGLU anyway, for the gradients of gate and up.
"""

import functools
import math
from typing import Any

import jax

from deepseek_jax.kernels.kernel_names import OUTER, QUANTISE
from deepseek_jax.precision.expert_tiles import quantise_rows
from deepseek_jax.precision.fp8_form import Fp8Form
from deepseek_jax.precision.fp8_hopper_quantise import HopperQuantiser, takes_weight
from deepseek_jax.precision.fp8_sources import FromKept, Plain, Source, TileSource
from deepseek_jax.precision.fp8_tiles import BLOCK, Tiles, quantise_tiles
from deepseek_jax.precision.fp8_weights import Fp8Weight, Linear, quantise_blocks
from deepseek_jax.precision.token_tiles import TokenTiles, quantise_tokens


def rows(x: jax.Array, form: Fp8Form, source: Source | None = None) -> Tiles:
    """Tiles of 128 columns of x ...D; of x MD, if there is a source."""
    if isinstance(source, FromKept):
        return source.tiles
    if source is not None and form.uses(QUANTISE):
        made = functools.partial(_rows_of_source, form)
        return form.choose(QUANTISE, made, _quantiser(form).rows)(source)

    def portable(x: jax.Array) -> Tiles:
        return quantise_tiles(x, power_of_two=form.power_of_two)

    def kernel(x: jax.Array) -> Tiles:
        # In whole tiles BSHW is (BS)(HW), too, as the product takes it: XLA makes both at once.
        rows = x.shape[:2] if x.ndim == 4 and x.shape[-1] % BLOCK == 0 else x.shape[:-1]
        tiles = _quantiser(form).rows(Plain(x.reshape(math.prod(rows), -1)))
        return Tiles(tiles.values.reshape(x.shape), tiles.scales.reshape(*x.shape[:-1], -1))

    return form.choose(QUANTISE, portable, kernel, takes=_takes(x, form))(x)


def tokens(
    x: jax.Array,
    form: Fp8Form,
    sizes: jax.Array | None = None,
    source: Source | None = None,
) -> Tiles | TokenTiles:
    """Tiles of 128 rows of x MD; of one expert each with `sizes`, as in `token_tiles.py`.

    Returns:
      `TokenTiles` for the kernel of a weight's gradient; `Tiles` of the rows in their order, if it
      is not in use.
    """
    if not form.uses(OUTER):
        if sizes is not None:
            return quantise_rows(x, sizes, form.power_of_two)
        return quantise_tiles(x, power_of_two=form.power_of_two, axis=-2)

    def portable(source: TileSource, sizes: jax.Array | None) -> TokenTiles:
        return quantise_tokens(source.portable(), sizes, form.power_of_two)

    def kernel(source: TileSource, sizes: jax.Array | None) -> TokenTiles:
        if sizes is None:
            return _quantiser(form).tokens(source)
        return _quantiser(form).tokens_of_experts(source, sizes)

    read: TileSource = Plain(x)
    if isinstance(source, FromKept) and form.uses(QUANTISE):
        read = source
    takes = form.power_of_two and read.fits
    return form.choose(QUANTISE, portable, kernel, takes=takes)(read, sizes)


def both(x: jax.Array, form: Fp8Form) -> tuple[Tiles, Tiles | TokenTiles]:
    """`rows` and `tokens` of x MD, in one reading by a kernel.

    The kernel makes both even where one is not used: not for what is computed again in backward.
    """
    if not form.uses(OUTER):
        return rows(x, form), tokens(x, form)

    def portable(x: jax.Array) -> tuple[Tiles, TokenTiles]:
        return (
            quantise_tiles(x, power_of_two=form.power_of_two),
            quantise_tokens(x, None, form.power_of_two),
        )

    def kernel(x: jax.Array) -> tuple[Tiles, TokenTiles]:
        return _quantiser(form).both(Plain(x))

    return form.choose(QUANTISE, portable, kernel, takes=_takes(x, form))(x)


def blocks(weight: jax.Array, linear: Linear, form: Fp8Form) -> Fp8Weight:
    """`quantise_blocks` of a weight, or of this device's part of it."""

    def portable(weight: jax.Array) -> Fp8Weight:
        return quantise_blocks(weight, linear, power_of_two=form.power_of_two)

    def kernel(weight: jax.Array) -> Fp8Weight:
        return _quantiser(form).blocks(weight, linear)

    takes = form.power_of_two and takes_weight(weight, linear)
    return form.choose(QUANTISE, portable, kernel, takes=takes)(weight)


def _rows_of_source(form: Fp8Form, source: TileSource) -> Tiles:
    return quantise_tiles(source.portable(), power_of_two=form.power_of_two)


def _quantiser(form: Fp8Form) -> HopperQuantiser:
    interpret: Any = form.hopper.interpret
    return HopperQuantiser(interpret)


def _takes(x: jax.Array, form: Fp8Form) -> bool:
    return form.power_of_two and Plain(x).fits
