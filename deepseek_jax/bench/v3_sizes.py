"""Sizes of DeepSeek-V3 for benchmarks on one GPU, whatever model the config has."""

import dataclasses
from typing import Any

from deepseek_jax.config import ModelConfig

# Widths of one MoE layer.
LAYER: dict[str, Any] = dict(
    d_model=7168, heads=128, q_latent=1536, kv_latent=512, d_nope=128, d_rope=64, d_value=128,
    shared_experts=1, d_expert=2048,
)  # fmt: skip
MODEL: dict[str, Any] = {**LAYER, "d_dense": 18_432, "experts": 256, "top_k": 8}
LENGTH = 4096  # tokens of a sequence, one of which is a micro-batch of a GPU
GROUP = 64  # GPUs that share the routed experts of a layer (section 3.1)


def of_v3(model: ModelConfig) -> ModelConfig:
    """The model with V3's widths and numbers of experts."""
    return dataclasses.replace(model, **MODEL)
