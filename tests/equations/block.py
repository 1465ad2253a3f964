"""Transformer block: attention and feed-forward, each after a norm and beside a residual."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .attention import attention
from .moe import mixture, swiglu
from .norm import part, rms_norm
from .router import Routing


def block(
    x: np.ndarray, weights: Mapping[str, np.ndarray], settings: Mapping[str, Any], *, dense: bool
) -> tuple[np.ndarray, np.ndarray, Routing | None]:
    """x BTD -> the block's output, its attention's output before the residual, and its routing."""
    eps = settings["rms_norm_eps"]
    h = rms_norm(x, weights["input_layernorm.weight"], eps)
    attended = attention(h, part(weights, "self_attn"), settings)
    x = x + attended
    u = rms_norm(x, weights["post_attention_layernorm.weight"], eps)
    mlp = part(weights, "mlp")
    out, routing = (
        (swiglu(u, mlp, settings.get("swiglu_limit", 0.0)), None)
        if dense
        else mixture(u, mlp, settings)
    )
    return x + out, attended, routing
