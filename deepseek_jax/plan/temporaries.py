"""Temporaries of the compiler: a model of what is live at the worst moment, with fitted counts.

The worst moment is in the backward pass of an MoE layer, at its experts. Live are then

- rows of the experts' slots: tokens, gate_up, SwiGLU and gradients of the three, and messages;
- with overflow rounds, whose backward is a loop inside, more of them, and the sums over rounds of
  the gradients of the experts' weights, in float32;
- the residual stream, and queries, keys, values and outputs of the heads, which the recomputed
  attention and its gradient wait for;
- scores of one block of queries and their gradient, where no kernel computes attention;
- the dense layer's hidden rows, which XLA computes again before it needs them;
- the gradient of the embedding, in float32.

The shapes are those of the program. How many arrays of a shape are live at once is the scheduler's
choice: the counts below are fitted to what XLA reports for the configs named beside them
(jax 0.10.2). docs/performance.md has the errors of other configs.
"""

import dataclasses

from deepseek_jax.config import Config
from deepseek_jax.model import remat
from deepseek_jax.plan.activations import FLOAT32, DeviceShapes
from deepseek_jax.train.last_stage import PARTS


@dataclasses.dataclass(frozen=True)
class LiveArrays:
    """Arrays of each shape that are live at once, counted in the compute dtype.

    Attributes:
      rows: Arrays of the experts' slots with the model's width.
      hidden: Arrays of the experts' slots with the width of gate_up.
      stream: Arrays of the tokens with the model's width; one in float32 counts two.
      heads: Arrays of the queries, keys, values and outputs of all heads.
      dense: Arrays of a dense layer's gate_up.
    """

    rows: float
    hidden: float
    stream: float
    heads: float
    dense: float


ONE_ROUND = LiveArrays(rows=3, hidden=3, stream=20, heads=1, dense=1.5)  # fitted to v3_small
ONE_ROUND_FP8 = LiveArrays(2, 2, 8, 1, 0.75)  # fitted to v3_small in FP8, recompute report and full
ROUNDS = LiveArrays(rows=6, hidden=4.5, stream=20, heads=1, dense=1.5)  # fitted to v2_lite_16b
SPACE = 0.75  # of gradients of a chunk's other layers; fitted to v3_671b, stages of v3_16b


def messages(shapes: DeviceShapes) -> int:
    """Bytes of the buffers of one message: what is sent over the last hop, and what arrives."""
    if not shapes.hops:
        return 0
    parts, slots = shapes.hops[-1]
    return 2 * parts * slots * shapes.activation * shapes.model.d_model


def of_layer(config: Config, shapes: DeviceShapes) -> int:
    """Bytes of the temporaries in backward of a stack of layers, messages included.

    Of two micro-batches in flight one is at its experts at a time, while the tokens of the other
    travel: of the second one only the tokens' arrays are live as well (compiled, four layouts of
    `moonlight_16b` with overflow rounds; not compiled without).
    """
    model, size = shapes.model, shapes.activation
    counts = _counts(shapes)
    total = _at_experts(config, shapes, counts)
    if model.dense_layers:
        total += counts.dense * shapes.dense_tokens * 2 * shapes.dense_width * size
    total += table_gradient(shapes)
    others = config.layout.micro_batches_in_flight - 1
    return int(total + others * _of_tokens(shapes, counts))


def _counts(shapes: DeviceShapes) -> LiveArrays:
    one_round = ONE_ROUND_FP8 if shapes.fp8 else ONE_ROUND
    return one_round if shapes.complete else ROUNDS


def _at_experts(config: Config, shapes: DeviceShapes, counts: LiveArrays) -> float:
    """Bytes of the rows and tokens of a layer in backward, at its experts."""
    model = shapes.model
    rows = counts.rows * model.d_model + counts.hidden * 2 * shapes.expert_width
    total = shapes.activation * shapes.slots * rows + _of_tokens(shapes, counts)
    if not shapes.attention_kernel:  # scores of a block of queries, and their gradient
        block = min(shapes.attention_block, shapes.length)
        scored = shapes.heads + 2 * bool(model.index_heads)  # the indexer's head by head, and all
        total += 2 * FLOAT32 * shapes.sequences * scored * block * shapes.length
    if keeps_all(config):  # nothing is computed again: half, fitted to v3_small
        total /= 2
    return total if shapes.complete else total + FLOAT32 * expert_weights(shapes)


def _of_tokens(shapes: DeviceShapes, counts: LiveArrays) -> float:
    """Bytes of the residual stream, and of queries, keys, values and outputs of the heads."""
    model = shapes.model
    heads = 2 * shapes.heads * (model.d_nope + model.d_rope + model.d_value)
    tokens = counts.stream * model.d_model + counts.heads * heads
    return shapes.activation * shapes.tokens * tokens


def table_gradient(shapes: DeviceShapes) -> int:
    """Bytes of the gradient of the embedding's or the head's table, in float32."""
    return FLOAT32 * shapes.vocab * shapes.model.d_model


def keeps_all(config: Config) -> bool:
    """Whether a layer computes nothing again in backward."""
    policy = remat.BY_NAME[config.layout.recompute]
    return policy.matmuls and config.layout.zero < 3 and config.mesh.pipe == 1


def expert_weights(shapes: DeviceShapes) -> int:
    """Numbers in the weights of a layer's routed experts on this device."""
    return 3 * shapes.experts * shapes.model.d_model * shapes.expert_width


def of_head(config: Config, shapes: DeviceShapes) -> int:
    """Bytes of a chunk's logits and their gradient, of the table's gradient, and of the rows."""
    model = shapes.model
    rows = (1 + model.mtp_depth) * shapes.tokens
    chunk = min(config.layout.loss_chunk, rows) * shapes.vocab_shares
    logits = chunk * shapes.vocab * (2 * FLOAT32 + shapes.activation)
    return logits + 2 * table_gradient(shapes) + 3 * rows * model.d_model * shapes.activation


def of_tick(config: Config, shapes: DeviceShapes, kept: int, space: int) -> int:
    """Bytes of the temporaries of a pipeline's tick, messages included.

    Backward first reads all that its chunk kept, because writes to the pools wait for it; what
    forward keeps goes into the pools at once.

    Args:
      kept: Bytes that a chunk keeps of one micro-batch.
      space: Result of `space_between`.
    """
    return int(kept + _at_experts(config, shapes, _counts(shapes)) + space)


def of_last_stage(config: Config, shapes: DeviceShapes, module: int, space: int) -> int:
    """Bytes of the temporaries of a pipeline's end, messages included.

    Backward of an MTP module overlaps with the head before it: live are the gradients of the table
    from both heads, their sum and that of the embedding, and one part's logits and their gradient.

    Args:
      module: Bytes that the MTP modules keep of one micro-batch.
      space: Result of `space_between`.
    """
    part = max(min(config.layout.loss_chunk, shapes.tokens // PARTS), 1) * shapes.vocab_shares
    logits = part * shapes.vocab * (FLOAT32 + shapes.activation)
    ends = module + logits + 4 * table_gradient(shapes) + space
    if not shapes.model.mtp_depth:
        return ends
    # No forward chunk is beside it; fitted to stages of v3_16b.
    counts = dataclasses.replace(_counts(shapes), hidden=3)
    return int(ends + _at_experts(config, shapes, counts))


def space_between(layers: int, layer_gradients: int) -> int:
    """Bytes between buffers that the assignment of a pipelined program leaves unused.

    A tick makes the gradients of its layers' weights in float32, layer by layer. Space that these
    buffers had is too small for some of those that are live later.

    Args:
      layers: Layer slots of a chunk.
      layer_gradients: Bytes of the gradients of one layer's weights, in float32.
    """
    return int(SPACE * (layers - 1) * layer_gradients)
