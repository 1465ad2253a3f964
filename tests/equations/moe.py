"""Feed-forward layers: SwiGLU, and DeepSeekMoE around it (section 2.1.2, equation 12)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .norm import part
from .router import Routing, route


def swiglu(u: np.ndarray, weights: Mapping[str, np.ndarray], limit: float = 0.0) -> np.ndarray:
    """W_down (silu(W_gate u) * W_up u); with a limit a, of min(gate, a) and up within [-a, a]."""
    gate = u @ weights["gate_proj.weight"].T
    up = u @ weights["up_proj.weight"].T
    if limit:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (gate / (1 + np.exp(-gate)) * up) @ weights["down_proj.weight"].T


def mixture(
    u: np.ndarray, weights: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> tuple[np.ndarray, Routing]:
    """sum_e g_e FFN_e(u) + FFN_shared(u) (12), without the residual; weights of one `mlp`.

    Every chosen expert computes every token that chose it: none is dropped.
    """
    routing, limit = route(u, weights, settings), settings.get("swiglu_limit", 0.0)
    shared = part(weights, "shared_experts")
    out = swiglu(u, shared, limit) if settings["n_shared_experts"] else 0 * u
    for expert in range(settings["n_routed_experts"]):
        where = routing.experts == expert
        g = np.sum(where * routing.weights, -1, keepdims=True)  # 0 for those who did not choose it
        sent = where.any(-1)
        out[sent] += g[sent] * swiglu(u[sent], part(weights, f"experts.{expert}"), limit)
    return out, routing
