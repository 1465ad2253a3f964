"""Modules built from weights under published names, so that both sides have the same weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from equations import checkpoints
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.transformer import Transformer, abstract_model

GROUP_SCORE = {"noaux_tc": "top2", "group_limited_greedy": "max", "greedy": "max"}
PLAIN = {
    "attention_norm.scale": "input_layernorm",
    "attention.query_down": "self_attn.q_a_proj",
    "attention.query_norm.scale": "self_attn.q_a_layernorm",
    "attention.query_up": "self_attn.q_b_proj",
    "attention.query": "self_attn.q_proj",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm.scale": "self_attn.kv_a_layernorm",
    "attention.kv_up": "self_attn.kv_b_proj",
    "attention.out": "self_attn.o_proj",
    "attention.indexer.query_up": "self_attn.indexer.wq_b",
    "attention.indexer.key_down": "self_attn.indexer.wk",
    "attention.indexer.key_norm.scale": "self_attn.indexer.k_norm",
    "attention.indexer.head_weights": "self_attn.indexer.weights_proj",
    "feed_norm.scale": "post_attention_layernorm",
    "feed.down": "mlp.down_proj",
    "feed.router.centroids": "mlp.gate",
    "feed.shared.down": "mlp.shared_experts.down_proj",
    "embedding_norm.scale": "enorm",
    "hidden_norm.scale": "hnorm",
    "project": "eh_proj",
    "out_norm.scale": "shared_head.norm",
}


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    yarn = settings["rope_scaling"] or {}
    return ModelConfig(
        vocab=settings["vocab_size"],
        layers=settings["num_hidden_layers"],
        dense_layers=settings["first_k_dense_replace"],
        d_model=settings["hidden_size"],
        d_dense=settings["intermediate_size"],
        heads=settings["num_attention_heads"],
        q_latent=settings["q_lora_rank"] or 0,
        kv_latent=settings["kv_lora_rank"],
        d_nope=settings["qk_nope_head_dim"],
        d_rope=settings["qk_rope_head_dim"],
        d_value=settings["v_head_dim"],
        index_heads=settings.get("index_n_heads", 0),
        index_width=settings.get("index_head_dim", 128),
        index_top_k=settings.get("index_topk", 2048),
        rope_theta=float(settings["rope_theta"]),
        yarn_factor=float(yarn.get("factor", 1)),
        yarn_original=yarn.get("original_max_position_embeddings", 4096),
        yarn_beta_fast=float(yarn.get("beta_fast", 32)),
        yarn_beta_slow=float(yarn.get("beta_slow", 1)),
        yarn_mscale=float(yarn.get("mscale", 1)),
        yarn_mscale_all_dim=float(yarn.get("mscale_all_dim", 1)),
        experts=settings["n_routed_experts"],
        shared_experts=settings["n_shared_experts"],
        top_k=settings["num_experts_per_tok"],
        groups=settings["n_group"],
        top_groups=settings["topk_group"],
        d_expert=settings["moe_intermediate_size"],
        score=settings["scoring_func"],
        group_score=GROUP_SCORE[settings["topk_method"]],
        normalise_weights=settings["norm_topk_prob"],
        routed_scale=settings["routed_scaling_factor"],
        swiglu_limit=settings.get("swiglu_limit", 0.0),
        mtp_depth=settings["num_nextn_predict_layers"],
        norm_eps=settings["rms_norm_eps"],
        init_std=settings["initializer_range"],
    )


def load(settings: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Transformer:
    """Our model with these weights, which are [out, in]."""
    config = model_config(settings)
    first = {"dense_layers": 0, "moe_layers": config.dense_layers, "mtp": config.layers}
    top = {
        "embedding.table": weights["model.embed_tokens.weight"],
        "norm.scale": weights["model.norm.weight"],
        "head.table": weights["lm_head.weight"].T,
    }

    def one(path: Any, variable: nnx.Variable) -> nnx.Variable:
        name = ".".join(str(getattr(key, "name", getattr(key, "key", key))) for key in path)
        if name in top:
            return variable.replace(jnp.asarray(top[name]))
        stack, own = name.split(".", 1)
        own = own.removeprefix("block.")
        layers = [
            _of_layer(weights, f"model.layers.{first[stack] + i}", own, variable.shape[1:])
            for i in range(variable.shape[0])
        ]
        return variable.replace(jnp.asarray(np.stack(layers)))

    return jax.tree_util.tree_map_with_path(one, abstract_model(config), is_leaf=params.is_variable)


def _of_layer(
    weights: Mapping[str, np.ndarray], layer: str, own: str, shape: tuple[int, ...]
) -> np.ndarray:
    if own in PLAIN:
        return weights[f"{layer}.{PLAIN[own]}.weight"].T.reshape(shape)
    if own == "attention.indexer.key_norm.bias":
        return weights[f"{layer}.self_attn.indexer.k_norm.bias"]
    if own == "feed.router.bias":
        none = np.zeros(shape, np.float32)
        return weights.get(f"{layer}.mlp.gate.e_score_correction_bias", none)
    if own.startswith("feed.experts."):
        each = [f"{layer}.mlp.experts.{e}" for e in range(shape[0])]
        if own.endswith("down"):
            return np.stack([weights[f"{e}.down_proj.weight"].T for e in each])
        return np.stack([_gate_up(weights, e) for e in each])
    shared = "shared_experts" if "shared" in own else ""
    return _gate_up(weights, f"{layer}.mlp.{shared}".removesuffix("."))


def _gate_up(weights: Mapping[str, np.ndarray], own: str) -> np.ndarray:
    return np.stack([weights[f"{own}.{half}_proj.weight"].T for half in ("gate", "up")], axis=1)


def variant(name: str, **changes: Any) -> tuple[dict, dict[str, np.ndarray], Transformer]:
    """(settings, float64 weights, our model) of one of `checkpoints.VARIANTS`.

    `changes` are settings that no shape depends on.
    """
    settings, weights = checkpoints.make(name)
    settings |= changes
    wide = {key: np.asarray(value, np.float64) for key, value in weights.items()}
    return settings, wide, load(settings, weights)


def layer(stack: Any, index: int = 0) -> Any:
    """One layer of a stack."""
    return jax.tree.map(lambda x: x[index], stack)
