"""Work of one layer on one device for one micro-batch: matmuls, attention core, bytes, messages.

T tokens of the device, D model width, H heads, K experts per token. A layer has two parts,
attention and the feed-forward network, each with three phases: forward F, gradient of the input I,
and gradient of the weights W, as schedules name them. Rows of experts are those of a balanced
router; `imbalance` multiplies those of the device with the most.
"""

import dataclasses
import math
from collections.abc import Mapping

from deepseek_jax.config import Config, ModelConfig
from deepseek_jax.parallel.pipeline.schedule import Work
from deepseek_jax.plan.messages import Message, exchanges, tensor_messages, width_messages

FORWARD, INPUTS, WEIGHTS = Work.FORWARD, Work.INPUT_GRAD, Work.WEIGHT_GRAD
BF16, FP8 = 2, 1  # bytes of a number


@dataclasses.dataclass(frozen=True)
class Matmul:
    """Product of rows x contraction by contraction x columns, in equal groups of rows.

    Attributes:
      groups: Weights of the product: the experts of a device; 1 for a dense product.
      linear: Whether the recipe decides the format; otherwise it is 16 bits.
      gradient: Whether it is the gradient of a weight, which contracts tokens.
    """

    rows: float
    contraction: float
    columns: float
    groups: int = 1
    linear: bool = True
    gradient: bool = False

    @property
    def flops(self) -> float:
        """Floating-point operations; a multiply-add counts two."""
        return 2 * self.rows * self.contraction * self.columns


@dataclasses.dataclass(frozen=True)
class PartWork:
    """Work of one part of a layer in one phase.

    Attributes:
      matmuls: Products.
      core_flops: Of the attention core; causal, so half of all scores.
      quantised_bytes: Read and written to make FP8 tiles; 0 in other recipes.
      pointwise_bytes: Read and written by all else in layers, mostly by short kernels.
      streamed_bytes: Read and written by long passes over one large array, as the logits are.
    """

    matmuls: tuple[Matmul, ...] = ()
    core_flops: float = 0.0
    quantised_bytes: float = 0.0
    pointwise_bytes: float = 0.0
    streamed_bytes: float = 0.0

    def __add__(self, other: "PartWork") -> "PartWork":
        return PartWork(
            self.matmuls + other.matmuls,
            self.core_flops + other.core_flops,
            self.quantised_bytes + other.quantised_bytes,
            self.pointwise_bytes + other.pointwise_bytes,
            self.streamed_bytes + other.streamed_bytes,
        )


Part = Mapping[Work, PartWork]


@dataclasses.dataclass(frozen=True)
class LayerWork:
    """Work of a layer.

    Attributes:
      attention, feed: Work of the two parts in each phase.
      messages: Of each phase, in the order in which they are sent.
      tensor: Messages between tensor-parallel ranks, of each phase.
    """

    attention: Part
    feed: Part
    messages: Mapping[Work, tuple[Message, ...]]
    tensor: Mapping[Work, tuple[Message, ...]]


@dataclasses.dataclass(frozen=True)
class DeviceShare:
    """Sizes of a device's share of a layer.

    Attributes:
      config: Config of the run.
      tokens: T.
      attention: "mla"; or "mha" or "gqa", which answer the same model without latents.
      imbalance: Rows of the device with the most rows of experts, over the mean.
      sequence_ranks: Ranks that split the tokens of a sequence everywhere but in attention, which
        gathers them (Megatron's sequence parallelism); this project's programs have 1.
      shared_widths: Whether data-parallel devices share widths as `layout.rules` says; otherwise
        each device computes its own tokens, as published systems are assumed to.
      each_expert: Whether a flat all-to-all sends a copy of a token for each of its experts, as
        NCCL's of permuted rows does; otherwise one for each GPU.
      keeps_all: Whether `recompute=none` keeps all in layer passes, too, as published systems do;
        this project's passes keep what `report` keeps.
    """

    config: Config
    tokens: int
    attention: str = "mla"
    imbalance: float = 1.0
    sequence_ranks: int = 1
    shared_widths: bool = True
    each_expert: bool = False
    keeps_all: bool = False

    @property
    def fp8(self) -> bool:
        return self.config.precision.recipe == "fp8"

    @property
    def devices_of_experts(self) -> int:
        """Devices that share the experts of a layer."""
        mesh, over = self.config.mesh, self.config.layout.rules.get("experts", ())
        return math.prod(getattr(mesh, axis) for axis in over)


GQA_HEADS = 8


def layer_work(shape: DeviceShare, *, dense: bool) -> LayerWork:
    """Work of a dense or an MoE layer."""
    feed = _dense(shape) if dense else _experts(shape)
    attention = _attention(shape)
    if shape.config.layout.recompute == "full":
        attention = {**attention, INPUTS: attention[INPUTS] + attention[FORWARD]}
        feed = {**feed, INPUTS: feed[INPUTS] + feed[FORWARD]}
    sent = _exchanges(shape)
    return LayerWork(
        attention=attention,
        feed=feed,
        messages={FORWARD: (), INPUTS: (), WEIGHTS: ()} if dense else sent,
        tensor=_inside(shape, dense),
    )


def _exchanges(shape: DeviceShare) -> dict[Work, tuple[Message, ...]]:
    """Messages to experts; those of the last hop end at the fullest device."""
    flat = shape.config.layout.dispatch == "flat"
    slow, fast = shape.imbalance if flat else 1.0, shape.imbalance
    return {
        phase: tuple(Message(m.name, slow * m.slow_bytes, fast * m.fast_bytes) for m in sent)
        for phase, sent in exchanges(shape.config, shape.tokens, shape.each_expert).items()
    }


def _inside(shape: DeviceShare, dense: bool) -> dict[Work, tuple[Message, ...]]:
    """Messages of a layer besides those to experts: a wide network gathers tokens and scatters."""
    found = tensor_messages(shape.config, shape.tokens, shape.sequence_ranks)
    wide: tuple[Message, ...] = ()
    if dense and shape.shared_widths:
        wide = width_messages(shape.config, shape.tokens, "dense_width", 2)
    return {**found, FORWARD: found[FORWARD] + wide, INPUTS: found[INPUTS] + wide}


def _linears(model: ModelConfig, attention: str, tensor: int) -> list[tuple[str, int, int]]:
    """(name, input width, output width) of attention's linear layers on one tensor rank."""
    d, heads = model.d_model, model.heads // tensor
    if attention != "mla":
        pairs = model.heads if attention == "mha" else min(GQA_HEADS, model.heads)
        width = model.d_nope
        return [
            ("qkv", d, heads * width + 2 * max(1, pairs // tensor) * width),
            ("o", heads * model.d_value, d),
        ]
    query = heads * (model.d_nope + model.d_rope)
    down = model.kv_latent + model.d_rope
    up = [("kv_b", model.kv_latent, heads * (model.d_nope + model.d_value))]
    if model.index_heads:  # on every tensor rank
        up.append(("index_q", model.q_latent, model.index_heads * model.index_width))
        down += model.index_width + model.index_heads
    if model.q_latent:
        up.append(("q_b", model.q_latent, query))
        first = [("qkv_a", d, model.q_latent + down)]
    else:
        first = [("q", d, query), ("kv_a", d, down)]
    return [*first, *up, ("o", heads * model.d_value, d)]


def _three(
    linears: list[tuple[int, int]], rows: float, groups: int = 1
) -> dict[Work, tuple[Matmul, ...]]:
    """The three products of each linear layer, given as (input width, output width)."""
    each = rows / groups
    return {
        FORWARD: tuple(Matmul(rows, k, n, groups) for k, n in linears),
        INPUTS: tuple(Matmul(rows, n, k, groups) for k, n in linears),
        WEIGHTS: tuple(Matmul(k * groups, each, n, groups, gradient=True) for k, n in linears),
    }


def _quantised(
    shape: DeviceShare, linears: list[tuple[int, int]], rows: float, received: bool = False
) -> dict[Work, float]:
    """Bytes of making FP8 tiles: rows of x; rows and tokens of d_out, tokens of x.

    Where they are `received` in FP8, the first x and the last d_out have tiles of rows already, and
    tiles of tokens are made from those.
    """
    if not shape.fp8:
        return {FORWARD: 0.0, INPUTS: 0.0, WEIGHTS: 0.0}
    inputs, outputs = sum(k for k, _ in linears), sum(n for _, n in linears)
    forward = inputs * (BF16 + FP8)
    backward = outputs * (BF16 + 2 * FP8) + inputs * (BF16 + FP8)
    if received:
        forward -= linears[0][0] * (BF16 + FP8)
        backward -= linears[0][0] * (BF16 - FP8) + linears[-1][1] * BF16
    return {FORWARD: rows * forward, INPUTS: rows * backward, WEIGHTS: 0.0}


def _attention(shape: DeviceShare) -> Part:
    model, t = shape.config.model, shape.tokens
    tensor = shape.config.mesh.tensor
    named = _linears(model, shape.attention, tensor)
    linears = [(k, n) for _, k, n in named]
    heads, d = model.heads // tensor, model.d_model
    width = model.d_nope + (model.d_rope if shape.attention == "mla" else 0)
    scores = t * shape.config.batch.length * heads  # causal: half of T S H multiply-adds
    forward_core = scores * (width + model.d_value)
    backward_core = scores * (3 * width + 2 * model.d_value)  # scores again, and four products
    if shape.attention == "mla":  # this project computes all scores, and masks what is not selected
        index = t * shape.config.batch.length * model.index_heads * model.index_width
        forward_core, backward_core = forward_core + index, backward_core + 3 * index
    latents = (model.q_latent + model.kv_latent) if shape.attention == "mla" else 0
    # The norm reads and writes, the residual sum reads two and writes one; so do the latents'
    # norms; the rotary embedding and the keys' concatenation read and write each head.
    norms = BF16 * t * (5 * d + 2 * latents)
    heads_bytes = BF16 * t * heads * (4 * model.d_rope + 2 * model.d_nope)
    products, tiles = _three(linears, t), _quantised(shape, linears, t)
    backward = PartWork(products[INPUTS], backward_core, tiles[INPUTS], 2 * (norms + heads_bytes))
    policy = _policy(shape)
    if policy in ("report", "attention"):
        again = [(k, n) for name, k, n in named if name in ("kv_b", "q_b", "index_q")]
        backward += PartWork(_three(again, t)[FORWARD], 0.0, 0.0, norms / 2)
    if policy == "attention":
        down = [(d, model.kv_latent + model.d_rope)] if shape.attention == "mla" else []
        backward += PartWork(_three(down, t)[FORWARD], forward_core)
    return {
        FORWARD: PartWork(products[FORWARD], forward_core, tiles[FORWARD], norms + heads_bytes),
        INPUTS: backward,
        WEIGHTS: PartWork(products[WEIGHTS]),
    }


def _policy(shape: DeviceShare) -> str:
    """The recompute policy by its work: in layer passes `none` saves what `report` saves."""
    mesh, layout = shape.config.mesh, shape.config.layout
    passes = mesh.pipe > 1 or layout.micro_batches_in_flight > 1 or layout.zero == 3
    limited = layout.recompute == "none" and passes and not shape.keeps_all
    return "report" if limited else layout.recompute


def _dense(shape: DeviceShare) -> Part:
    model, mesh, t = shape.config.model, shape.config.mesh, shape.tokens
    split = math.prod(
        getattr(mesh, axis) for axis in shape.config.layout.rules.get("dense_width", ())
    )
    gathered = split // mesh.tensor  # devices whose tokens meet where the width is split over data
    return _ffn(shape, model.d_dense // split, t * gathered, 1)


def _experts(shape: DeviceShare) -> Part:
    model, t, tensor = shape.config.model, shape.tokens, shape.config.mesh.tensor
    here = max(1, model.experts // shape.devices_of_experts)
    rows = t * model.top_k * shape.imbalance
    routed = _ffn(shape, model.d_expert // tensor, rows, here)
    if not model.shared_experts:
        return routed
    shared = _ffn(shape, model.d_shared // tensor, t, 1)
    return {phase: routed[phase] + shared[phase] for phase in (FORWARD, INPUTS, WEIGHTS)}


def _ffn(shape: DeviceShare, hidden: int, rows: float, groups: int) -> dict[Work, PartWork]:
    """SwiGLU network of `rows` rows in `groups` experts; one with groups > 1 permutes its rows."""
    d = shape.config.model.d_model
    linears = [(d, 2 * hidden), (hidden, d)]
    received = groups > 1 and shape.config.precision.dispatch == "fp8"
    products = _three(linears, rows, groups)
    tiles = _quantised(shape, linears, rows, received)
    swiglu = BF16 * rows * 3 * hidden
    permuted = (FP8 + FP8 if shape.fp8 else BF16 + BF16) * rows * d if groups > 1 else 0.0
    residual = BF16 * shape.tokens * 5 * d if groups == 1 else 0.0
    forward = PartWork(products[FORWARD], 0.0, tiles[FORWARD], swiglu + permuted + residual)
    again = swiglu if _policy(shape) != "none" else 0.0
    backward = PartWork(
        products[INPUTS], 0.0, tiles[INPUTS], 2 * swiglu + again + permuted + residual
    )
    return {FORWARD: forward, INPUTS: backward, WEIGHTS: PartWork(products[WEIGHTS])}
