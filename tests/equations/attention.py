"""Multi-head latent attention (section 2.1.1, equations 1 to 11), as trained and as decoded."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from . import indexer
from .norm import LATENT_EPS, rms_norm
from .rotary import rotate, softmax_scale


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def queries(
    h: np.ndarray, weights: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """h BTD, the normalised layer input -> q^C BHTN and q^R BHTR, the latter rotated."""
    batch, length, _ = h.shape
    heads, nope = settings["num_attention_heads"], settings["qk_nope_head_dim"]
    if settings.get("q_lora_rank"):
        latent = h @ weights["q_a_proj.weight"].T  # 6
        latent = rms_norm(latent, weights["q_a_layernorm.weight"], LATENT_EPS)
        q = latent @ weights["q_b_proj.weight"].T  # 7
    else:
        q = h @ weights["q_proj.weight"].T
    q = q.reshape(batch, length, heads, -1).swapaxes(1, 2)  # BT(H(N+R)) -> BHT(N+R)
    q_rope = rotate(q[..., nope:], np.arange(length), settings)  # 8
    return q[..., :nope], q_rope


def cached(
    h: np.ndarray, weights: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """All that decoding keeps of a token: the normalised c^KV BTC, and the rotated k^R BTR."""
    rank = settings["kv_lora_rank"]
    down = h @ weights["kv_a_proj_with_mqa.weight"].T
    latent = rms_norm(down[..., :rank], weights["kv_a_layernorm.weight"], LATENT_EPS)  # 1
    return latent, rotate(down[..., rank:], np.arange(h.shape[1]), settings)  # 3


def up_projections(
    weights: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """W^UK (HNC) and W^UV (HVC): kv_b_proj is head-major, key rows before value rows."""
    heads, rank = settings["num_attention_heads"], settings["kv_lora_rank"]
    both = weights["kv_b_proj.weight"].reshape(heads, -1, rank)
    nope = settings["qk_nope_head_dim"]
    return both[:, :nope], both[:, nope:]


def causal(scores: np.ndarray) -> np.ndarray:
    """scores (..., T, J): position t sees j <= t."""
    later = np.triu(np.ones(scores.shape[-2:], bool), 1)
    return np.where(later, -np.inf, scores)


def selected(
    scores: np.ndarray,
    h: np.ndarray,
    weights: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
) -> np.ndarray:
    """scores BHTJ, causal and, in V3.2, of the positions that the indexer selects."""
    scores = causal(scores)
    if not settings.get("index_topk"):
        return scores
    chosen = indexer.selected(indexer.scores(h, weights, settings), settings["index_topk"])
    return np.where(chosen[:, None], scores, -np.inf)  # equation 2 of V3.2


def attention(
    h: np.ndarray, weights: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> np.ndarray:
    """The form that is trained: h BTD -> u BTD, before the residual."""
    weights_of_keys, v = attention_weights(h, weights, settings)
    return _output(weights_of_keys @ v, weights)  # 10, 11


def attention_weights(
    h: np.ndarray,
    weights: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    *,
    dense: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax BHTJ and values BHJV; in V3.2 over selected positions, unless `dense`."""
    q_nope, q_rope = queries(h, weights, settings)
    latent, k_rope = cached(h, weights, settings)
    w_uk, w_uv = up_projections(weights, settings)
    k_nope = np.einsum("BJC,HNC->BHJN", latent, w_uk)  # 2
    v = np.einsum("BJC,HVC->BHJV", latent, w_uv)  # 5
    scores = np.einsum("BHTN,BHJN->BHTJ", q_nope, k_nope)  # 4, 9, 10
    scores = scores + np.einsum("BHTR,BJR->BHTJ", q_rope, k_rope)
    scores = softmax_scale(settings) * scores
    seen = causal(scores) if dense else selected(scores, h, weights, settings)
    return softmax(seen), v  # 10


def absorbed(
    h: np.ndarray, weights: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> np.ndarray:
    """The form that decodes: the same u, from the cached latents alone.

    q^C . (W^UK c) = (W^UK^T q^C) . c, and sum_j a_j W^UV c_j = W^UV sum_j a_j c_j.
    """
    q_nope, q_rope = queries(h, weights, settings)
    latent, k_rope = cached(h, weights, settings)
    w_uk, w_uv = up_projections(weights, settings)
    q_latent = np.einsum("BHTN,HNC->BHTC", q_nope, w_uk)
    scores = np.einsum("BHTC,BJC->BHTJ", q_latent, latent)
    scores = scores + np.einsum("BHTR,BJR->BHTJ", q_rope, k_rope)
    scores = selected(softmax_scale(settings) * scores, h, weights, settings)
    mean = np.einsum("BHTJ,BJC->BHTC", softmax(scores), latent)
    return _output(np.einsum("BHTC,HVC->BHTV", mean, w_uv), weights)


def _output(o: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    batch, _, length, _ = o.shape
    return o.swapaxes(1, 2).reshape(batch, length, -1) @ weights["o_proj.weight"].T
