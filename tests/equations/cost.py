"""Cost of a model by formula: parameters, operations and cache per token."""

import dataclasses
from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
      main: all of the main model, its two tables included.
      activated: those one token uses, its two tables included.
      activated_without_table: the same without the input table.
      mtp: what all MTP modules add of their own.
    """

    main: int
    activated: int
    activated_without_table: int
    mtp: int


def attention_parameters(settings: Settings) -> int:
    """One layer: d q + q + q H (n + r) + d (c + r) + c + c H (n + v) + H v d."""
    d, heads = settings["hidden_size"], settings["num_attention_heads"]
    q, c = settings.get("q_lora_rank") or 0, settings["kv_lora_rank"]
    n, r, v = (settings[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v"))
    query = d * q + q + q * heads * (n + r) if q else d * heads * (n + r)
    mla = query + d * (c + r) + c + c * heads * (n + v) + heads * v * d
    return mla + indexer_parameters(settings)


def indexer_parameters(settings: Settings) -> int:
    """V3.2, one layer: q j i + d i + 2 i + d j; 0 without an indexer."""
    if not settings.get("index_topk"):
        return 0
    d, q = settings["hidden_size"], settings["q_lora_rank"]
    j, i = settings["index_n_heads"], settings["index_head_dim"]
    return q * j * i + d * i + 2 * i + d * j


def moe_layer_parameters(settings: Settings, routed: int) -> int:
    """One block with `routed` of its routed experts; the correction bias counts as parameters."""
    d, experts = settings["hidden_size"], settings["n_routed_experts"]
    expert = 3 * d * settings["moe_intermediate_size"]
    bias = experts if settings["topk_method"] == "noaux_tc" else 0
    gate = experts * d + bias
    chosen = (routed + settings["n_shared_experts"]) * expert
    return attention_parameters(settings) + 2 * d + gate + chosen


def parameters(settings: Settings) -> Counts:
    d, table = settings["hidden_size"], settings["vocab_size"] * settings["hidden_size"]
    dense_layers = settings["first_k_dense_replace"]
    moe_layers = settings["num_hidden_layers"] - dense_layers
    dense = attention_parameters(settings) + 2 * d + 3 * d * settings["intermediate_size"]
    whole = moe_layer_parameters(settings, settings["n_routed_experts"])
    used = moe_layer_parameters(settings, settings["num_experts_per_tok"])
    rest = dense_layers * dense + 2 * table + d
    return Counts(
        main=rest + moe_layers * whole,
        activated=rest + moe_layers * used,
        activated_without_table=rest + moe_layers * used - table,
        mtp=settings.get("num_nextn_predict_layers", 0) * (whole + 2 * d * d + 3 * d),
    )


def training_flops_per_token(settings: Settings, length: int, *, causal: bool = True) -> float:
    """6 N_act + 6 L (H (n + r + v) A + j i S c), N_act without the input table.

    A is the mean number of positions that a token attends to: S c, with c = 1/2 if causal; in V3.2
    no token attends to more than index_topk. Forward is one third. MTP, recompute and the choice of
    experts are not in it.
    """
    width = sum(settings[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v"))
    layers, scored = settings["num_hidden_layers"], length * (0.5 if causal else 1.0)
    attended, index = scored, 0
    if settings.get("index_topk"):
        k = settings["index_topk"]
        if k < length:
            attended = sum(min(t, k) if causal else k for t in range(length)) / length
        index = settings["index_n_heads"] * settings["index_head_dim"] * scored
    pairs = layers * (settings["num_attention_heads"] * width * attended + index)
    return 6 * parameters(settings).activated_without_table + 6 * pairs


def cache_bytes_per_token(settings: Settings, bytes_each: int = 2) -> int:
    """MLA: one latent and one rotary key per layer, (c + r) L numbers; V3.2 adds an index key."""
    each = settings["kv_lora_rank"] + settings["qk_rope_head_dim"]
    each += settings["index_head_dim"] if settings.get("index_topk") else 0
    return each * settings["num_hidden_layers"] * bytes_each


def grouped_cache_bytes_per_token(
    layers: int, key_heads: int, head_width: int, bytes_each: int = 2
) -> int:
    """GQA: 2 g d_h L numbers; MHA with g = H, MQA with g = 1."""
    return 2 * key_heads * head_width * layers * bytes_each
