"""Multi-token prediction (section 2.2, equations 21 to 23) at any depth."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .block import block
from .norm import part, rms_norm
from .router import Routing


@dataclasses.dataclass(frozen=True)
class Depth:
    """Module k = 1, 2, ... on T - k positions.

    Attributes:
      hidden: B(T-k)D, h^k, what module k + 1 starts from.
      head_input: B(T-k)D, what the shared head reads.
      logits: B(T-k)V; position i predicts token i + k + 1.
      routing: of its mixture of experts.
    """

    hidden: np.ndarray
    head_input: np.ndarray
    logits: np.ndarray
    routing: Routing


def modules(
    main: np.ndarray,
    tokens: np.ndarray,
    weights: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
) -> list[Depth]:
    """Every depth of `num_nextn_predict_layers`.

    main BTD is the main model's output after its final norm, tokens BT int. Module k is stored as
    layer `num_hidden_layers` + k - 1. Table and head are the main model's; copies in the
    checkpoint are not read.
    """
    eps, depths, h = settings["rms_norm_eps"], [], main
    for k in range(1, settings.get("num_nextn_predict_layers", 0) + 1):
        own = part(weights, f"model.layers.{settings['num_hidden_layers'] + k - 1}")
        e = weights["model.embed_tokens.weight"][tokens[:, k:]]  # token i + k, at position i
        e = rms_norm(e, own["enorm.weight"], eps)
        h = rms_norm(h[:, :-1], own["hnorm.weight"], eps)
        x = np.concatenate([e, h], -1) @ own["eh_proj.weight"].T  # 21, [embedding ; hidden]
        h, _, routing = block(x, own, settings, dense=False)  # 22
        assert routing is not None
        head_input = rms_norm(h, own["shared_head.norm.weight"], eps)
        logits = head_input @ weights["lm_head.weight"].T  # 23, before the softmax
        depths.append(Depth(h, head_input, logits, routing))
    return depths
