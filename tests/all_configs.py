"""The files of configs/, and a model under the published names."""

import importlib
import pathlib

from deepseek_jax import config as configs

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def load(name):
    return configs.parse(importlib.import_module(f"configs.{name}").get_config())


def settings(model):
    """A model under the published names, for tests/equations/cost.py."""
    indexer = {
        "index_n_heads": model.index_heads,
        "index_head_dim": model.index_width,
        "index_topk": model.index_top_k,
    }
    return (indexer if model.index_heads else {}) | {
        "hidden_size": model.d_model,
        "num_attention_heads": model.heads,
        "q_lora_rank": model.q_latent,
        "kv_lora_rank": model.kv_latent,
        "qk_nope_head_dim": model.d_nope,
        "qk_rope_head_dim": model.d_rope,
        "v_head_dim": model.d_value,
        "n_routed_experts": model.experts,
        "n_shared_experts": model.shared_experts,
        "moe_intermediate_size": model.d_expert,
        "intermediate_size": model.d_dense,
        "vocab_size": model.vocab,
        "num_hidden_layers": model.layers,
        "first_k_dense_replace": model.dense_layers,
        "num_experts_per_tok": model.top_k,
        "num_nextn_predict_layers": model.mtp_depth,
        "topk_method": "noaux_tc",  # a router bias always, zero in V2's models
    }
