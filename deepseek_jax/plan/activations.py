"""Activations that a layer keeps for backward, in closed form: bytes on one device.

`residual_trace.py` reads the same bytes from a trace, which takes seconds; tests hold the two
equal. Letters: B sequences of a micro-batch, S positions, T = BS tokens, D model width, H heads, K
experts of a token, R rows, P destinations of a hop, J = min(K, P) copies of a row, F width.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax

from deepseek_jax.config import DATA_AXES, Config, ModelConfig, buffer_slots, most_nodes
from deepseek_jax.kernels import attention_cudnn
from deepseek_jax.model import execution, remat
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.plan import residual_trace
from deepseek_jax.precision.fp8_tiles import BLOCK
from deepseek_jax.precision.recipes import recipe
from deepseek_jax.precision.saved import Saved

INT32 = FLOAT32 = 4
STREAM, LATENTS, ATTENTION = "residual stream", "latents", "attention's output"
SWIGLU, ROWS, ROUTING, OTHER = "inputs of SwiGLU", "received tokens", "routing", "all else"
KINDS = (STREAM, LATENTS, ATTENTION, SWIGLU, ROWS, ROUTING, OTHER)


@dataclasses.dataclass(frozen=True)
class DeviceShapes:
    """Sizes of one micro-batch on one device.

    Attributes:
      model: Sizes of the model.
      sequences, length: B and S.
      heads: H of this device.
      dense_tokens: Tokens that a dense layer's part of this device works on; more than T where
        `dense_width` is split over devices with different tokens.
      dense_width, shared_width, expert_width: F of this device.
      vocab: Rows of the tables on this device.
      vocab_shares: Devices with different tokens whose rows its part of the head scores.
      experts: Routed experts of this device.
      hops: (P, slots of a lane) of each all-to-all on the way to the experts.
      slots: Slots for the copies that this device's experts work on.
      activation: Bytes of a number between two matmuls.
      fp8: Whether inputs of linear layers are kept in FP8.
      fp8_payload: Whether tokens travel in FP8.
      attention_block: Query rows of attention that are scored at once.
      attention_kernel: Whether a kernel computes attention, which saves its output.
    """

    model: ModelConfig
    sequences: int
    length: int
    heads: int
    dense_tokens: int
    dense_width: int
    shared_width: int
    expert_width: int
    vocab: int
    vocab_shares: int
    experts: int
    hops: tuple[tuple[int, int], ...]
    slots: int
    activation: int
    fp8: bool
    fp8_payload: bool
    attention_block: int
    attention_kernel: bool

    @property
    def tokens(self) -> int:
        """T, tokens of the micro-batch on this device."""
        return self.sequences * self.length

    @property
    def complete(self) -> bool:
        """Whether the buffers hold whatever a router may choose: no overflow rounds."""
        rows = self.tokens
        for parts, slots in self.hops:
            if slots < rows:
                return False
            rows = parts * slots
        return self.slots >= rows * min(self.model.top_k, self.experts)

    @property
    def payload(self) -> int:
        """Bytes of a token's row as it travels."""
        width = self.model.d_model
        return tile_bytes(width) if self.fp8_payload else self.activation * width


def tile_bytes(width: int) -> int:
    """Bytes of a row of `width` numbers in E4M3, with an exponent for each 128 of them."""
    return width + -(-width // BLOCK)


def device_shapes(config: Config) -> DeviceShapes:
    """Sizes of one micro-batch on one device.

    Args:
      config: Config of the run, whose mesh has no -1.

    Raises:
      ConfigError: A buffer without a slot.
    """
    model, layout = config.model, meshes.layout(config)
    chosen, kernels = recipe(config.precision.recipe), execution.kernels_of(config.precision)
    sequences = config.batch.micro_sequences // _parts(layout, "batch")
    tokens = sequences * config.batch.length
    over = layout.mesh_axes("experts")
    fast = tuple(n for n in over if config.layout.dispatch == "two_hop" and n == "gpu")
    hops = [group for group in (tuple(n for n in over if n not in fast), fast) if group]
    parts = tuple(math.prod(layout.sizes[name] for name in group) for group in hops)
    *lanes, slots = buffer_slots(
        config.layout.capacity_factor, tokens, model.top_k, model.experts, parts, most_nodes(model)
    )
    heads, dtype = model.heads // _parts(layout, "heads"), chosen.activation_dtype
    head: tuple[Any, ...] = tuple(
        jax.ShapeDtypeStruct((1, 1, heads, width), dtype)
        for width in (model.d_nope + model.d_rope, model.d_value)
    )
    return DeviceShapes(
        model=model,
        sequences=sequences,
        length=config.batch.length,
        heads=heads,
        dense_tokens=tokens * _data_parts(layout, "dense_width"),
        dense_width=model.d_dense // _parts(layout, "dense_width"),
        shared_width=model.d_shared // _parts(layout, "expert_width"),
        expert_width=model.d_expert // _parts(layout, "expert_width"),
        vocab=model.vocab // _parts(layout, "vocab"),
        vocab_shares=_data_parts(layout, "vocab"),
        experts=model.experts // math.prod(parts),
        hops=tuple(zip(parts, lanes, strict=True)),
        slots=slots,
        activation=dtype.itemsize,
        fp8=config.precision.recipe == "fp8",
        fp8_payload=config.precision.dispatch == "fp8",
        attention_block=config.layout.attention_block,
        attention_kernel=attention_cudnn.chosen(kernels.names) is not None
        and attention_cudnn.takes(*head)
        and not model.index_heads,
    )


def _parts(layout: Layout, axis: str) -> int:
    """Devices that a logical axis is split over."""
    return math.prod(layout.sizes[name] for name in layout.mesh_axes(axis))


def _data_parts(layout: Layout, axis: str) -> int:
    """Devices with different tokens that a logical axis is split over."""
    return math.prod(layout.sizes[n] for n in layout.mesh_axes(axis) if n in DATA_AXES)


def layer_residuals(config: Config, *, dense: bool = False) -> Mapping[str, int]:
    """Bytes that a layer keeps of the micro-batches in flight on one device, by `KINDS`.

    With a pipeline a layer slot that may have a dense layer keeps what an MoE layer keeps, but for
    the input of the shared experts' SwiGLU. Closed form for the policies that
    save names; traced, and then remembered, for others: `recompute=none` without a pipeline, and
    `dispatch=reference`.

    Args:
      config: Config of the run, whose mesh has no -1.
      dense: Whether the layer is dense; with a pipeline, whether its slot may have a dense layer.
    """
    staged = config.mesh.pipe > 1
    policy = remat.BY_NAME[config.layout.recompute]
    named = not policy.matmuls or config.layout.zero == 3
    many = config.layout.micro_batches_in_flight if not staged else 1
    if config.layout.dispatch == "reference" or not (staged or named):
        return _traced(_shape_keys(config), dense and not staged)
    shapes = device_shapes(config)
    if many == 1:
        return _closed_form(shapes, policy, dense=dense, staged=staged)
    kept = _closed_form(shapes, policy, dense=dense, staged=staged, passes=True)
    frequencies, biases = FLOAT32 * (shapes.model.d_rope // 2), FLOAT32 * shapes.model.experts
    constants = frequencies if dense else many * frequencies + biases
    return {kind: many * size for kind, size in kept.items()} | {OTHER: constants}


def _shape_keys(config: Config) -> Config:
    """The config with what shapes do not depend on set to constants, as a key of `_traced`."""
    batch = dataclasses.replace(config.batch, sequences=0, ramp_sequences=0, ramp_tokens=0)
    layout = dataclasses.replace(
        config.layout, rules=FrozenRules(config.layout.rules), cost_profile="", stage_layers=()
    )
    return dataclasses.replace(config, seed=0, batch=batch, layout=layout)


class FrozenRules(dict[str, tuple[str, ...]]):
    """Rules of a layout that can be a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


@functools.lru_cache(maxsize=256)
def _traced(config: Config, dense: bool) -> Mapping[str, int]:
    if config.mesh.pipe > 1:
        leaves = residual_trace.of_layer_pass(config)
    else:
        leaves = residual_trace.of_block(config, dense=dense)
    return {OTHER: sum(map(residual_trace.nbytes, leaves))}


def _closed_form(
    shapes: DeviceShapes, policy: remat.Remat, *, dense: bool, staged: bool, passes: bool = False
) -> Mapping[str, int]:
    """Bytes of the residuals that a policy names, and in a stage those that a `LayerPass` needs.

    Args:
      passes: Whether a `LayerPass` runs the layer, as in a stage, and its routing is kept whole.
    """
    model, tokens, size = shapes.model, shapes.tokens, shapes.activation
    kept = {STREAM: size * tokens * model.d_model}  # the layer's input
    routed = staged or not dense
    if policy.names:
        kept[STREAM] *= 2  # and the stream after attention
        kept[LATENTS] = size * tokens * model.q_latent
        if Saved.KV_LATENT in policy.names:
            kept[LATENTS] += size * tokens * (model.kv_latent + model.d_rope)
        if Saved.ATTENTION in policy.names:
            kept[ATTENTION] = _attention_bytes(shapes)
        if policy.keep_scores and not shapes.attention_kernel:
            kept[ATTENTION] += _scores_bytes(shapes)
        kept[SWIGLU] = shapes.slots * _kept_input(shapes, 2 * shapes.expert_width) * routed
        if not routed:
            kept[SWIGLU] = shapes.dense_tokens * _kept_input(shapes, 2 * shapes.dense_width)
        elif shapes.shared_width and not (dense and policy.resend):
            kept[SWIGLU] += tokens * _kept_input(shapes, 2 * shapes.shared_width)
    if policy.names or not staged:
        kept[OTHER] = FLOAT32 * (model.d_rope // 2)  # frequencies of the rotary embedding
    if routed and not (policy.names or staged):
        kept[OTHER] += FLOAT32 * model.experts  # biases of the router
    if not routed or not (policy.names or staged):
        return kept
    if staged and policy.resend and len(shapes.hops) > 1:  # as received over the slow hop
        parts, slots = shapes.hops[0]
        kept[ROWS] = parts * slots * _words(shapes)
    else:
        kept[ROWS] = shapes.slots * shapes.payload
    kept[ROWS] += FLOAT32 * shapes.slots  # routing weights
    kept[ROUTING] = _routing_bytes(shapes, policy, whole=staged or passes)
    return kept


def _words(shapes: DeviceShapes) -> int:
    """Bytes of a token's row in words of 32 bits, each array padded to whole words."""
    width = shapes.model.d_model
    parts = (width, -(-width // BLOCK)) if shapes.fp8_payload else (shapes.activation * width,)
    return sum(4 * -(-part // 4) for part in parts)


def _kept_input(shapes: DeviceShapes, width: int) -> int:
    """Bytes of a row of the input of a linear layer that is kept for backward."""
    return tile_bytes(width) if shapes.fp8 else shapes.activation * width


def _attention_bytes(shapes: DeviceShapes) -> int:
    """Bytes of the heads' outputs; with a kernel E5M6 in FP8, and the logarithm of each sum."""
    heads = shapes.tokens * shapes.heads
    width = shapes.model.d_value
    if not shapes.attention_kernel:
        return heads * _kept_input(shapes, width)
    packed = width + width // 2 + -(-width // BLOCK) if shapes.fp8 else shapes.activation * width
    return heads * (packed + FLOAT32)


def _scores_bytes(shapes: DeviceShapes) -> int:
    """Bytes of the softmaxes in float32, in blocks of queries with the keys up to their end."""
    length, block = shapes.length, shapes.attention_block
    ends = (min(start + block, length) for start in range(0, length, block))
    scores = sum(((end - 1) % block + 1) * end for end in ends)
    return FLOAT32 * shapes.sequences * shapes.heads * scores


def _routing_bytes(shapes: DeviceShapes, policy: remat.Remat, *, whole: bool) -> int:
    """Bytes of the chosen experts and of the slots of their copies on every hop."""
    top_k, tokens = shapes.model.top_k, shapes.tokens
    rows, total = tokens, INT32 * shapes.experts  # rows of each local expert
    for parts, slots in (*((p, p * s) for p, s in shapes.hops), (shapes.experts, shapes.slots)):
        copies = min(top_k, parts)
        # choice and used of each slot; slot, sent, choice_slot and choice_sent of each row
        total += (INT32 + 1) * (slots + rows * (copies + top_k))
        rows = slots
    choices = tokens * top_k
    total += INT32 * choices if policy.names else 0  # chosen, that a second gate weighs again
    if whole:  # weights, chosen, what is left, number of rounds
        return total + (2 * INT32 + 1) * choices + FLOAT32
    return total + (0 if shapes.complete else choices)
