"""Router (section 2.1.2): equations 13 to 16, node-limited choice, bias update and balance loss."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .attention import softmax


@dataclasses.dataclass(frozen=True)
class Routing:
    """Routing of one layer.

    Attributes:
      logits: BTE, before the score function, without bias.
      scores: BTE, s.
      experts: BTK int, in increasing order: their order means nothing.
      weights: BTK, g of those experts, final.
      load: E int, tokens sent to each expert.
      margin: BT, how far the choice is from another one, in units of the score.
      balance: B, equation 17 without alpha.
    """

    logits: np.ndarray
    scores: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    load: np.ndarray
    margin: np.ndarray
    balance: np.ndarray


def route(u: np.ndarray, weights: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Routing:
    """u BTD, the normalised input of the layer's experts; weights of one `mlp`."""
    logits = u @ weights["gate.weight"].T
    s = affinities(logits, settings)
    biased = s + weights.get("gate.e_score_correction_bias", 0.0)
    experts, margin = choose(biased, settings)
    load = loads(experts, s.shape[-1])
    balance = sequence_balance(s, settings["num_experts_per_tok"])
    return Routing(logits, s, experts, weigh(s, experts, settings), load, margin, balance)


def affinities(logits: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """s = sigmoid(u . e) (15), the softmax over all experts (V2), or sqrt(ln(1 + e^x)) (V4)."""
    if settings["scoring_func"] == "sqrtsoftplus":
        return np.sqrt(np.logaddexp(0, logits))
    return softmax(logits) if settings["scoring_func"] == "softmax" else 1 / (1 + np.exp(-logits))


def top(x: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest, in increasing order; of equals, the first."""
    return np.sort(np.argsort(-x, axis=-1, kind="stable")[..., :count], axis=-1)


def choose(biased: np.ndarray, settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(16), on the best groups only: biased (..., E) -> experts (..., K) and the margin (...).

    A group's score is the sum of its two best experts (V3, "noaux_tc") or its best one (V2,
    "group_limited_greedy"); "greedy" knows no groups. Experts of other groups are excluded (-inf).
    """
    method, margin = settings["topk_method"], np.full(biased.shape[:-1], np.inf)
    if method != "greedy" and settings["n_group"] > 1:
        groups = biased.reshape(*biased.shape[:-1], settings["n_group"], -1)
        counted = {"noaux_tc": 2, "group_limited_greedy": 1}[method]
        group_score = np.sort(groups, -1)[..., -counted:].sum(-1)
        kept = np.zeros(group_score.shape, bool)
        np.put_along_axis(kept, top(group_score, settings["topk_group"]), True, -1)
        biased = np.where(kept[..., None], groups, -np.inf).reshape(biased.shape)
        margin = _gap(group_score, settings["topk_group"])
    count = settings["num_experts_per_tok"]
    return top(biased, count), np.minimum(margin, _gap(biased, count))


def _gap(x: np.ndarray, count: int) -> np.ndarray:
    """Gap between the last chosen value and the first one not chosen."""
    ordered = -np.sort(-x, -1)
    nothing_left = count == x.shape[-1]
    return (
        np.full(x.shape[:-1], np.inf)
        if nothing_left
        else ordered[..., count - 1] - ordered[..., count]
    )


def weigh(s: np.ndarray, experts: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """g = s / sum of the chosen s (13, 14), without the bias, then the routed scale."""
    chosen = np.take_along_axis(s, experts, -1)
    if settings["norm_topk_prob"]:
        chosen = chosen / chosen.sum(-1, keepdims=True)
    return chosen * settings["routed_scaling_factor"]


def loads(experts: np.ndarray, total: int) -> np.ndarray:
    """c_e: tokens sent to each of `total` experts."""
    return np.bincount(experts.ravel(), minlength=total)


def max_violation(load: np.ndarray) -> np.ndarray:
    """MaxVio = (max load - mean load) / mean load, over the last axis."""
    return (load.max(-1) - load.mean(-1)) / load.mean(-1)


def move_bias(bias: np.ndarray, load: np.ndarray, speed: float) -> np.ndarray:
    """b + gamma sign(mean(c) - c), once per step, c from every token of the step."""
    return bias + speed * np.sign(load.mean(-1, keepdims=True) - load)


def sequence_balance(s: np.ndarray, count: int) -> np.ndarray:
    """sum_e f_e P_e (17) of each sequence, without alpha: 1 in perfect balance. s BTE -> B."""
    total, length = s.shape[-1], s.shape[-2]
    chosen = np.zeros(s.shape)
    np.put_along_axis(chosen, top(s, count), 1.0, -1)  # unbiased, and no groups
    f = total / (count * length) * chosen.sum(-2)  # 18
    p = (s / s.sum(-1, keepdims=True)).mean(-2)  # 19, 20
    return (f * p).sum(-1)
