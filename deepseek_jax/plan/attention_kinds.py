"""Multi-head and grouped-query attention in the place of MLA: memory and cache of the same model.

They have the same heads and no latents: queries, keys and values come from the layer's input in one
product. Backward needs them, so they are kept; MLA keeps its latents and makes the heads again.
Their times are in `layer_work.py`.
"""

import math
from typing import NamedTuple

from deepseek_jax.config import DATA_AXES, Config, ModelConfig
from deepseek_jax.parallel.pipeline import stage_assignment
from deepseek_jax.plan.kv_cache import cache_bytes_per_token
from deepseek_jax.precision.fp8_tiles import BLOCK

FLOAT32, BF16 = 4, 2
KINDS = ("mla", "mha", "gqa")


def cache_bytes(model: ModelConfig, attention: str) -> int:
    """Cache bytes per token in bfloat16 of "mla", "mha" or "gqa"."""
    return int(getattr(cache_bytes_per_token(model), attention))


def extra_bytes(config: Config, attention: str, live_layers: int) -> int:
    """Bytes on a device that another attention needs in training beyond those of MLA.

    Args:
      config: Config of the run with MLA, whose mesh has no -1.
      attention: "mla", "mha" or "gqa".
      live_layers: Layers, times the micro-batches whose activations each keeps at once.
    """
    if attention == "mla":
        return 0
    kept = _kept_widths(config, attention) - _kept_widths(config, "mla")
    mesh = config.mesh
    sequences = config.batch.micro_sequences // math.prod(getattr(mesh, a) for a in DATA_AXES)
    tokens = sequences * config.batch.length
    itemsize = FLOAT32 if config.precision.recipe == "float32" else BF16
    activations = itemsize * tokens * live_layers * kept / mesh.tensor
    return round(bytes_per_weight(config).total * extra_weights(config, attention) + activations)


def extra_weights(config: Config, attention: str) -> float:
    """Weights of a layer on a tensor-parallel rank with another attention, beyond those of MLA."""
    more = attention_weights(config.model, attention) - attention_weights(config.model, "mla")
    return more / config.mesh.tensor


def attention_weights(model: ModelConfig, attention: str) -> int:
    """Weights of the linear layers of one layer's attention; DeepSeek-V3 has 187,105,280 in MLA."""
    d, out = model.d_model, model.heads * model.d_value * model.d_model
    if attention != "mla":
        return d * _heads_width(model, attention) + out
    query = model.heads * (model.d_nope + model.d_rope)
    latent = model.q_latent
    queries = latent * (d + query) if latent else d * query
    keys = model.kv_latent * model.heads * (model.d_nope + model.d_value)
    mla = queries + d * (model.kv_latent + model.d_rope) + keys + out
    if not model.index_heads:
        return mla
    index = latent * model.index_heads * model.index_width
    return mla + index + d * (model.index_width + model.index_heads)


def layers_held(config: Config) -> int:
    """Layers that a device computes, with the empty slots of a pipeline's stages, without MTP."""
    if config.mesh.pipe == 1:
        return config.model.layers
    return math.prod(stage_assignment.assign_layers(config).layers.shape[1:])


class WeightBytes(NamedTuple):
    """Bytes on a device for one weight of a layer, by the fields of `memory.Memory`."""

    masters: float
    moments: float
    prepared: float
    gradients: float
    reduced: float
    gathered: float

    @property
    def total(self) -> float:
        return sum(self)


def bytes_per_weight(config: Config) -> WeightBytes:
    """Bytes on a device for each weight of a linear layer that every layer has, MTP's included.

    As `memory.memory` counts them, of a weight that is replicated over all but ZeRO's shards.
    """
    mesh, zero, layers = config.mesh, config.layout.zero, config.model.layers
    stored = layers + config.model.mtp_depth
    shards = math.prod(getattr(mesh, axis) for axis in (*DATA_AXES, "pipe")) if zero else 1
    sharded = zero == 3 and shards > 1  # the compute weights, too: one layer is gathered at a time
    own_copy = mesh.pipe > 1 or (shards > 1 and not sharded)  # not in the masters' layout
    prepared = {
        "float32": FLOAT32 * own_copy, "bfloat16": BF16, "fp8": 1 + FLOAT32 / BLOCK**2
    }[config.precision.recipe]  # fmt: skip
    held = stored / shards if sharded else layers_held(config) + config.model.mtp_depth
    moment = FLOAT32 if config.optimizer.moments == "float32" else BF16
    reduced = stored if shards > 1 and not sharded else layers * (mesh.pipe > 1)
    moments = 1 if config.optimizer.name == "muon" else 2
    return WeightBytes(
        masters=stored * FLOAT32 / shards,
        moments=stored * moments * moment / shards,
        prepared=held * prepared,
        gradients=held * FLOAT32,
        reduced=reduced * FLOAT32 / shards,
        gathered=(prepared or FLOAT32) * sharded,
    )


def _heads_width(model: ModelConfig, attention: str) -> int:
    """Width of queries, keys and values of all heads without latents."""
    pairs = model.heads if attention == "mha" else cache_bytes_per_token(model).gqa_heads
    return model.heads * model.d_nope + pairs * (model.d_nope + model.d_value)


def _kept_widths(config: Config, attention: str) -> int:
    """Numbers of queries, keys, values and latents of a token that a layer keeps for backward."""
    model, policy = config.model, config.layout.recompute
    if policy == "full":
        return 0
    if attention != "mla":
        return _heads_width(model, attention)
    latents = model.q_latent + model.kv_latent + model.d_rope
    heads = model.heads * (2 * (model.d_nope + model.d_rope) + model.d_value)
    return latents + (heads if policy == "none" else 0)
