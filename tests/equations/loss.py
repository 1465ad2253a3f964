"""Training loss: cross entropy, the MTP terms (24, 25), the balance term (17)."""

from collections.abc import Sequence

import numpy as np


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean of -log p(target) in nats; logits (..., V), targets (...) int."""
    top = logits.max(-1, keepdims=True)
    log_normaliser = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    target = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return float(np.mean(log_normaliser - target))


def next_token(logits: np.ndarray, tokens: np.ndarray, depth: int = 0) -> float:
    """Position i of depth k against token i + k + 1, over the positions that have one (24).

    The report divides by T where T - k terms are summed; this is the mean of those that exist.
    logits B(T-k)V, tokens BT.
    """
    return cross_entropy(logits[:, :-1], tokens[:, depth + 1 :])


def total(
    main: float,
    mtp: Sequence[float] = (),
    mtp_weight: float = 0.3,
    balance: Sequence[np.ndarray] = (),
    balance_alpha: float = 0.0001,
) -> float:
    """L = L_main + lambda / D sum_k L_k (25) + alpha * balance.

    The balance term is averaged over sequences and summed over layers; `balance` has one array B
    per layer.
    """
    mtp_term = mtp_weight * sum(mtp) / len(mtp) if mtp else 0.0
    return main + mtp_term + balance_alpha * float(sum(np.mean(layer) for layer in balance))
