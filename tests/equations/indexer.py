"""Lightning indexer of V3.2: equations 1 to 4 of the DeepSeek-V3.2-Exp report.

Without Hadamard rotation: an orthogonal rotation of queries and keys changes no product.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .norm import LATENT_EPS, rms_norm
from .rotary import cos_sin_factor, frequencies


def layer_norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * gain + bias


def rotate(x: np.ndarray, positions: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """x (..., T, I): x_j and x_(j + R/2), j < R/2, as one complex number; the rest stays."""
    half = settings["qk_rope_head_dim"] // 2
    turn = np.exp(1j * positions[:, None] * frequencies(settings)) * cos_sin_factor(settings)
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], -1)


def scores(
    h: np.ndarray, weights: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> np.ndarray:
    """I (B, T, S) of the normalised layer input h BTD, -inf for s > t."""
    batch, length, _ = h.shape
    heads, width = settings["index_n_heads"], settings["index_head_dim"]
    latent = h @ weights["q_a_proj.weight"].T
    latent = rms_norm(latent, weights["q_a_layernorm.weight"], LATENT_EPS)
    own = {name: weights[f"indexer.{name}"] for name in _NAMES}
    q = (latent @ own["wq_b.weight"].T).reshape(batch, length, heads, width).swapaxes(1, 2)
    q = rotate(q, np.arange(length), settings)  # BHTI
    k = layer_norm(h @ own["wk.weight"].T, own["k_norm.weight"], own["k_norm.bias"])
    k = rotate(k, np.arange(length), settings)  # BSI
    w = h @ own["weights_proj.weight"].T * heads**-0.5 * width**-0.5  # BTH
    products = np.maximum(np.einsum("BHTI,BSI->BHTS", q, k), 0)
    out = np.einsum("BTH,BHTS->BTS", w, products)  # 1
    return np.where(np.tri(length, dtype=bool), out, -np.inf)


_NAMES = ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")


def selected(index: np.ndarray, top_k: int) -> np.ndarray:
    """Whether t attends to s, (B, T, S) bool: the top_k largest of each row that are not -inf."""
    order = np.argsort(-index, axis=-1, kind="stable")[..., :top_k]
    chosen = np.zeros(index.shape, bool)
    np.put_along_axis(chosen, order, True, -1)
    return chosen & np.isfinite(index)


def loss(attention: np.ndarray, index: np.ndarray, seen: np.ndarray) -> float:
    """Equations 3 and 4: sum over t of KL(p_t || softmax I_t), over the positions seen.

    attention BHTS sums to one over s for each head, and is zero where `seen` BTS is false.
    """
    p = attention.sum(1)
    p = p / p.sum(-1, keepdims=True)
    shifted = np.where(seen, index, -np.inf)
    shifted = shifted - shifted.max(-1, keepdims=True)
    log_q = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    parts = p * (np.log(np.where(p > 0, p, 1)) - np.where(seen, log_q, 0))
    return float(parts.sum())
