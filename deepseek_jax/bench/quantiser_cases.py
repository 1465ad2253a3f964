"""Quantisers of V3's activations and weights, as cases of `kernel_case.py`.

Rows are those of a micro-batch, or of the experts of one GPU. The portable form is what XLA makes
of `precision/fp8_tiles.py`; there is no form in BF16, which quantises nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.bench.kernel_case import (
    KERNEL,
    PORTABLE,
    Form,
    KernelCase,
    Operands,
    numbers,
    row_major,
    traffic,
)
from deepseek_jax.bench.product_cases import LinearSizes
from deepseek_jax.config import ModelConfig
from deepseek_jax.kernels.kernel_names import QUANTISE
from deepseek_jax.precision.fp8_hopper_quantise import HopperQuantiser
from deepseek_jax.precision.fp8_sources import FromSwiGLU, Plain, TileSource
from deepseek_jax.precision.fp8_tiles import Tiles, quantise_tiles
from deepseek_jax.precision.fp8_weights import Linear, quantise_blocks
from deepseek_jax.precision.token_tiles import TokenTiles, quantise_tokens

SOURCES = f"{QUANTISE} of other sources"  # name of their check
GOAL = 0.8  # share of memory speed
_HOPPER = HopperQuantiser()
_ROWS, _TOKENS, _BOTH = "quantise rows", "quantise tokens", "quantise both"


def _rows(source: TileSource) -> Tiles:
    return quantise_tiles(source.portable(), power_of_two=True)


def _tokens(source: TileSource, *sizes: jax.Array) -> TokenTiles:
    tiles = quantise_tokens(source.portable(), sizes[0] if sizes else None, True)
    return TokenTiles(row_major(tiles.values), tiles.scales)


def _both(source: TileSource) -> tuple[Tiles, TokenTiles]:
    return _rows(source), _tokens(source)


_FORMS: Mapping[str, Mapping[str, Form]] = {
    _ROWS: {KERNEL: _HOPPER.rows, PORTABLE: _rows},
    _TOKENS: {KERNEL: _HOPPER.tokens, PORTABLE: _tokens},
    _BOTH: {KERNEL: _HOPPER.both, PORTABLE: _both},
}


def cases(model: ModelConfig, tokens: int, experts: LinearSizes) -> list[KernelCase]:
    """Quantisers of a layer, those that a recipe uses first.

    Args:
      experts: gate and up of the experts of this GPU.
    """
    x, of_experts = (tokens, model.d_model), (experts.rows, model.d_model)
    hidden = experts.rows, model.d_expert

    def plain(shape: tuple[int, int]) -> Callable[[jax.Array], TileSource]:
        return lambda seed: Plain(numbers(seed, shape))

    def gated(seed: jax.Array) -> TileSource:
        gate_up = numbers(seed, (hidden[0], 2 * hidden[1]))
        return FromSwiGLU(gate_up, jnp.full(hidden[:1], 0.5))

    return [
        _activations(_BOTH, "x", x, plain(x)),
        _activations(_ROWS, "x", x, plain(x)),
        _activations(_ROWS, "x of experts", of_experts, plain(of_experts)),
        _of_experts("x of experts", of_experts, experts, plain(of_experts)),
        _weights("experts, gate and up", experts, copy=False),
        _activations(_TOKENS, "x", x, plain(x)),
        _weights("experts, gate and up", experts, copy=True),
        _activations(_ROWS, "SwiGLU of gate and up", hidden, gated),
        _activations(_BOTH, "SwiGLU of gate and up", hidden, gated),
    ]


def _activations(
    piece: str, name: str, shape: tuple[int, int], source: Callable[[jax.Array], TileSource]
) -> KernelCase:
    def draw(seed: jax.Array) -> Mapping[str, Operands]:
        made = source(seed)
        return {KERNEL: (made,), PORTABLE: (made,)}

    forms = _FORMS[piece]
    moved = traffic(draw, forms[PORTABLE])
    return KernelCase(piece, name, shape, QUANTISE, draw, forms, moved, goal=GOAL)


def _of_experts(
    name: str,
    shape: tuple[int, int],
    experts: LinearSizes,
    source: Callable[[jax.Array], TileSource],
) -> KernelCase:
    def draw(seed: jax.Array) -> Mapping[str, Operands]:
        made = source(seed), *experts.sizes()
        return {KERNEL: made, PORTABLE: made}

    forms: dict[str, Form] = {KERNEL: _HOPPER.tokens_of_experts, PORTABLE: _tokens}
    moved = traffic(draw, _tokens)
    return KernelCase(_TOKENS, name, shape, QUANTISE, draw, forms, moved, goal=GOAL)


def _weights(name: str, experts: LinearSizes, *, copy: bool) -> KernelCase:
    linear = Linear.whole("-io", experts.weight)

    def draw(seed: jax.Array) -> Mapping[str, Operands]:
        weights = (numbers(seed, experts.weight, jnp.float32),)
        return {KERNEL: weights, PORTABLE: weights}

    def kernel(weights: jax.Array) -> Any:
        return (_HOPPER.blocks_and_copy if copy else _HOPPER.blocks)(weights, linear)

    def portable(weights: jax.Array) -> Any:
        blocks = quantise_blocks(weights, linear, power_of_two=True)
        values = row_major(blocks.values)
        made = dataclasses.replace(blocks, values=values)
        return (made, row_major(values.mT)) if copy else made

    piece = f"quantise blocks{' and copy' if copy else ''}"
    forms = {KERNEL: kernel, PORTABLE: portable}
    check = SOURCES if copy else QUANTISE
    moved = traffic(draw, portable)
    return KernelCase(piece, name, experts.weight, check, draw, forms, moved, goal=GOAL)
