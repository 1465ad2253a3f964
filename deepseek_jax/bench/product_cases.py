"""FP8 products of V3's linear layers, as cases of `kernel_case.py`.

M rows, K input width, N output width, E experts of this GPU. A layer has three products:

    forward           x w        M x K by K x N
    input gradient    d_out w^T  M x N by N x K
    weight gradient   x^T d_out  K x M by M x N, for each expert

Operands are quantised before. The forward kernel gets its transposed copy of the weight, which a
step makes at each use. BF16 is XLA's product with a result in BF16, and for experts the grouped
kernel of `kernels/grouped_triton.py`, as `precision.recipe=bfloat16` has it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.bench.kernel_case import (
    BFLOAT16,
    KERNEL,
    PORTABLE,
    Form,
    KernelCase,
    Operands,
    numbers,
    traffic,
)
from deepseek_jax.config import ModelConfig
from deepseek_jax.kernels import fp8_outer
from deepseek_jax.kernels.kernel_names import OUTER, PRODUCT
from deepseek_jax.kernels.matmul_tiling import OUTER_TILINGS, PRODUCT_TILINGS, Tiling
from deepseek_jax.precision import grouped
from deepseek_jax.precision.einsum import exact_einsum, row_product
from deepseek_jax.precision.expert_tiles import dequantise_rows, quantise_rows
from deepseek_jax.precision.fp8_hopper import HopperProducts
from deepseek_jax.precision.fp8_tiles import BLOCK, Tiles, dequantise_tiles, quantise_tiles
from deepseek_jax.precision.fp8_weights import Fp8Weight, Linear, quantise_blocks
from deepseek_jax.precision.token_tiles import TokenTiles, quantise_tokens

TILING = "tiling"  # piece of the rows of `tilings`
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input gradient", "weight gradient"
PAIRS = f"{PRODUCT} and {OUTER} in pairs"  # name of their check

# Goals in TFLOP/s: of large products, of products by expert, and of weight gradients.
GOAL, GROUPED_GOAL, OUTER_GOAL = 1300.0, 1200.0, 700.0
LARGE = 2e11  # FLOPs from which a product has a goal: 0.1 ms at the peak of an H100
_BF16 = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class LinearSizes:
    """Sizes of a linear layer, or of those of all experts of this GPU.

    Attributes:
      name: of the weight.
      rows, inputs, outputs: M, K and N.
      experts: E; 0 for a layer that all tokens use.
    """

    name: str
    rows: int
    inputs: int
    outputs: int
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes M, K, N, after E where there are experts."""
        return (self.experts,) * (self.experts > 0) + (self.rows, self.inputs, self.outputs)

    @property
    def flops(self) -> int:
        """Operations of each of the three products."""
        return 2 * self.rows * self.inputs * self.outputs

    @property
    def weight(self) -> tuple[int, ...]:
        """Shape KN or EKN of the weight."""
        return (self.experts,) * (self.experts > 0) + (self.inputs, self.outputs)

    def sizes(self) -> tuple[jax.Array, ...]:
        """Rows of each expert, within 2 % of even and no multiples of tiles; () without experts."""
        if not self.experts:
            return ()
        even = self.rows // self.experts
        off = np.round(0.02 * even * np.linspace(-1, 1, self.experts)).astype(np.int32)
        off[-1] -= off.sum()
        return (jnp.asarray(even + off, jnp.int32),)


def linear_layers(model: ModelConfig, tokens: int, group: int) -> list[LinearSizes]:
    """The linear layers of a model, the most important first.

    Args:
      tokens: of a micro-batch on this GPU.
      group: GPUs that share the routed experts. A balanced router gives each of them as many rows
        as its own tokens have choices.
    """
    width, heads = model.d_model, model.heads
    latents = model.q_latent, model.kv_latent + model.d_rope
    query, key_value = (model.d_nope + other for other in (model.d_rope, model.d_value))
    shared, own = model.shared_experts * model.d_expert, max(1, model.experts // group)
    rows = tokens * model.top_k
    found = [
        LinearSizes("W^O", tokens, heads * model.d_value, width),
        LinearSizes("experts, gate and up", rows, width, 2 * model.d_expert, own),
        LinearSizes("experts, down", rows, model.d_expert, width, own),
        LinearSizes("W^UQ", tokens, model.q_latent or width, heads * query),
        LinearSizes("shared, gate and up", tokens, width, 2 * shared),
        LinearSizes("shared, down", tokens, shared, width),
        LinearSizes("W^UK and W^UV", tokens, model.kv_latent, heads * key_value),
        LinearSizes("dense FFN, gate and up", tokens, width, 2 * model.d_dense),
        LinearSizes("dense FFN, down", tokens, model.d_dense, width),
        LinearSizes("W^DQ, W^DKV, W^KR joined", tokens, width, sum(latents)),
        LinearSizes("W^DQ", tokens, width, latents[0]),
        LinearSizes("W^DKV and W^KR", tokens, width, latents[1]),
    ]
    return [each for each in found if min(each.inputs, each.outputs) > 0]


def of_layer(layer: LinearSizes, hopper: HopperProducts) -> list[KernelCase]:
    """The three products of a layer."""
    plan = grouped.plan(layer.rows, layer.experts, layer.rows) if layer.experts else None
    kind, goal = ("experts", GROUPED_GOAL) if layer.experts else ("linear", GOAL)

    def case(piece: str, check: str, goal: float, made: _Made) -> KernelCase:
        draw, forms = made
        return KernelCase(
            piece=f"{kind} {piece}",
            name=layer.name,
            shape=layer.shape,
            check=check,
            draw=draw,
            forms=forms,
            bytes=traffic(draw, forms[PORTABLE]),
            flops=layer.flops,
            goal=goal if layer.flops >= LARGE else None,
        )

    given = layer, hopper, plan
    return [
        case(FORWARD, PRODUCT, goal, _forward(*given)),
        case(INPUT_GRADIENT, PRODUCT, goal, _input_gradient(*given)),
        case(WEIGHT_GRADIENT, OUTER, OUTER_GOAL, _weight_gradient(*given)),
    ]


def tilings(layer: LinearSizes, hopper: HopperProducts, *, pairs: bool) -> list[KernelCase]:
    """Forward by each tiling alone, or by each in pairs, and then the weight gradient in pairs."""
    forward, _, weight_gradient = of_layer(layer, hopper)
    found = []
    for tiling in PRODUCT_TILINGS:
        if tiling.pair == pairs and tiling.fits(layer.rows, layer.outputs):
            of_tiling = dataclasses.replace(hopper, pairs=pairs, tilings=(tiling,))
            check = PAIRS if pairs else PRODUCT
            found.append(forward.only(f"{layer.name}, {tiling}", _product(of_tiling), check))
    for tiling in OUTER_TILINGS:
        if pairs and tiling.pair and tiling.fits(layer.inputs, layer.outputs):
            name = f"{layer.name}, {OUTER} in pairs"
            kernel = functools.partial(_outer, tiling, hopper.sms)
            found.append(weight_gradient.only(name, kernel, PAIRS))
    return found


def _product(hopper: HopperProducts) -> Form:
    """The kernel of forward and input gradient: rows by a weight whose columns are contracted."""

    def run(
        values: jax.Array,
        scales: jax.Array,
        weights: jax.Array,
        weight_scales: jax.Array,
        *sizes: jax.Array,
    ) -> jax.Array:
        weight = Fp8Weight(weights, weight_scales)
        return hopper.input_gradient(Tiles(values, scales.mT), weight, *sizes, dtype=_BF16)

    return run


def _outer(
    tiling: Tiling, sms: int, x: TokenTiles, d_out: TokenTiles, *sizes: jax.Array
) -> jax.Array:
    """The kernel of a weight gradient whose widths are multiples of 128, in this tiling."""
    blocks = [(size + BLOCK - 1) // BLOCK for size in sizes]
    operands = x.values, x.scales, d_out.values, d_out.scales
    return fp8_outer.outer(*operands, *blocks, tiling=tiling, sms=sms)


def _numbers(seed: jax.Array, *shapes: tuple[int, ...]) -> list[jax.Array]:
    return [numbers(seed + i, shape) for i, shape in enumerate(shapes)]


def _quantised(layer: LinearSizes, weight: jax.Array) -> Fp8Weight:
    linear = Linear.whole("-io" if layer.experts else "io", layer.weight)
    return quantise_blocks(weight.astype(jnp.float32), linear, power_of_two=True)


_Made = tuple[Callable[[jax.Array], Mapping[str, Operands]], dict[str, Form]]


def _forward(layer: LinearSizes, hopper: HopperProducts, plan: grouped.Plan | None) -> _Made:
    def draw(seed: jax.Array) -> Mapping[str, Operands]:
        x, weight = _numbers(seed, (layer.rows, layer.inputs), layer.weight)
        tiles = quantise_tiles(x, power_of_two=True)
        blocks, sizes = _quantised(layer, weight), layer.sizes()
        copy = blocks.values.mT, blocks.scales.mT
        return {
            KERNEL: (tiles.values, tiles.scales.mT, *copy, *sizes),
            PORTABLE: (tiles, blocks, *sizes),
            BFLOAT16: (x, weight, *sizes),
        }

    def bfloat16(x: jax.Array, weight: jax.Array, *sizes: jax.Array) -> jax.Array:
        if plan is not None:
            return plan.product(x, weight, *sizes)
        return jnp.einsum("MK,KN->MN", x, weight)

    def portable(tiles: Tiles, blocks: Fp8Weight, *sizes: jax.Array) -> jax.Array:
        x, weight = dequantise_tiles(tiles, _BF16), blocks.dequantised(layer.inputs, _BF16)
        if plan is not None:
            return plan.product(x, weight, *sizes)
        return exact_einsum("MK,KN->MN", x, weight).astype(_BF16)

    return draw, {KERNEL: _product(hopper), BFLOAT16: bfloat16, PORTABLE: portable}


def _input_gradient(layer: LinearSizes, hopper: HopperProducts, plan: grouped.Plan | None) -> _Made:
    def draw(seed: jax.Array) -> Mapping[str, Operands]:
        d_out, weight = _numbers(seed, (layer.rows, layer.outputs), layer.weight)
        tiles = quantise_tiles(d_out, power_of_two=True)
        blocks, sizes = _quantised(layer, weight), layer.sizes()
        return {
            KERNEL: (tiles.values, tiles.scales.mT, blocks.values, blocks.scales, *sizes),
            PORTABLE: (tiles, blocks, *sizes),
            BFLOAT16: (d_out, weight, *sizes),
        }

    def bfloat16(d_out: jax.Array, weight: jax.Array, *sizes: jax.Array) -> jax.Array:
        if plan is not None:
            saved: Any = d_out, weight, *sizes
            return plan.rows_gradient(saved, d_out)
        return jnp.einsum("MN,KN->MK", d_out, weight)

    def portable(tiles: Tiles, blocks: Fp8Weight, *sizes: jax.Array) -> jax.Array:
        d_out, weight = dequantise_tiles(tiles, _BF16), blocks.dequantised(layer.inputs, _BF16)
        if plan is not None:
            return bfloat16(d_out, weight, *sizes)
        return exact_einsum("MN,KN->MK", d_out, weight).astype(_BF16)

    return draw, {KERNEL: _product(hopper), BFLOAT16: bfloat16, PORTABLE: portable}


def _weight_gradient(
    layer: LinearSizes, hopper: HopperProducts, plan: grouped.Plan | None
) -> _Made:
    def by_tokens(x: jax.Array, *sizes: jax.Array) -> Tiles:
        if sizes:
            return quantise_rows(x, sizes[0], True)
        return quantise_tiles(x, power_of_two=True, axis=-2)

    def draw(seed: jax.Array) -> Mapping[str, Operands]:
        both = _numbers(seed, (layer.rows, layer.inputs), (layer.rows, layer.outputs))
        sizes = layer.sizes()
        return {
            KERNEL: (
                *(quantise_tokens(x, sizes[0] if sizes else None, True) for x in both),
                *sizes,
            ),
            PORTABLE: (*(by_tokens(x, *sizes) for x in both), *sizes),
            BFLOAT16: (*both, *sizes),
        }

    def of_experts(dtype: Any, x: jax.Array, d_out: jax.Array, *sizes: jax.Array) -> jax.Array:
        assert plan is not None
        saved: Any = x, jnp.zeros((0,), x.dtype), *sizes
        return plan.weight_gradient(saved, d_out, layer.weight, dtype)

    def bfloat16(x: jax.Array, d_out: jax.Array, *sizes: jax.Array) -> jax.Array:
        if plan is not None:
            return of_experts(_BF16, x, d_out, *sizes)
        return jnp.einsum("MK,MN->KN", x, d_out)

    def portable(x: Tiles, d_out: Tiles, *sizes: jax.Array) -> jax.Array:
        if plan is not None:
            plain = (dequantise_rows(tiles, sizes[0], _BF16) for tiles in (x, d_out))
            return of_experts(jnp.float32, *plain, *sizes)
        return row_product("MK,MN->KN", *(dequantise_tiles(tiles, _BF16) for tiles in (x, d_out)))

    return draw, {KERNEL: hopper.weight_gradient, BFLOAT16: bfloat16, PORTABLE: portable}
