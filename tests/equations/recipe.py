"""The training recipe (section 4.2): the optimiser, and everything that follows consumed tokens."""

import math
from collections.abc import Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]


def global_norm(gradients: Arrays) -> float:
    return math.sqrt(sum(float(np.sum(np.asarray(g, np.float64) ** 2)) for g in gradients.values()))


def clip(gradients: Arrays, limit: float = 1.0) -> dict[str, np.ndarray]:
    """All gradients by one factor, so that their common l2 norm is at most `limit`."""
    factor = min(1.0, limit / max(global_norm(gradients), 1e-300))
    return {name: np.asarray(g, np.float64) * factor for name, g in gradients.items()}


def adamw(
    parameters: Arrays,
    gradients: Arrays,
    m: Arrays,
    v: Arrays,
    step: int,
    learning_rate: float,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    decay: Mapping[str, float] | float = 0.1,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Step number `step` = 1, 2, ...: (parameters, m, v) after it. m and v start as zeros.

    `decay` may differ by name: what is left out of it does not decay.
    """
    after: tuple[dict[str, np.ndarray], ...] = ({}, {}, {})
    for name, p in parameters.items():
        g, weight = gradients[name], decay.get(name, 0.0) if isinstance(decay, Mapping) else decay
        m_new = b1 * m[name] + (1 - b1) * g
        v_new = b2 * v[name] + (1 - b2) * g**2
        direction = (m_new / (1 - b1**step)) / (np.sqrt(v_new / (1 - b2**step)) + eps)
        p_new = p - learning_rate * (direction + weight * p)
        for kept, value in zip(after, (p_new, m_new, v_new), strict=True):
            kept[name] = value
    return after[0], after[1], after[2]


def ema(average: Arrays, parameters: Arrays, decay: float) -> dict[str, np.ndarray]:
    """decay * average + (1 - decay) * parameters; the report does not give the decay."""
    return {name: decay * old + (1 - decay) * parameters[name] for name, old in average.items()}


def learning_rate(
    step: float,
    tokens: float,
    *,
    peak: float = 2.2e-4,
    decayed: float = 2.2e-5,
    final: float = 7.3e-6,
    warmup_steps: float = 2000,
    decay_start: float = 10e12,
    decay_end: float = 14.3e12,
    final_start: float = 14.633e12,
) -> float:
    """Linear warm-up, constant, cosine, constant, final constant.

    `step` counts from 1, so that step `warmup_steps` is the first at the peak; `tokens` are those
    consumed before it, and a phase starts at its boundary.
    """
    if tokens >= final_start:
        return final
    if tokens >= decay_end:
        return decayed
    if tokens >= decay_start:
        done = (tokens - decay_start) / (decay_end - decay_start)
        return decayed + (peak - decayed) * (1 + math.cos(math.pi * done)) / 2
    return peak * min(step / warmup_steps, 1.0) if warmup_steps else peak


def batch_sequences(
    tokens: float, *, start: float = 3072, end: float = 15360, over: float = 469e9
) -> float:
    """Sequences of the step that starts after `tokens`, before rounding to what a layout can run.

    A straight line: the report does not give the shape of the ramp.
    """
    return start + (end - start) * min(tokens / over, 1.0) if over else end


def mtp_weight(
    tokens: float, *, early: float = 0.3, late: float = 0.1, switch: float = 10e12
) -> float:
    """lambda: 0.3 for the first 10T tokens, 0.1 after."""
    return late if tokens >= switch else early


def bias_speed(tokens: float, *, speed: float = 0.001, stop: float = 14.3e12) -> float:
    """gamma: 0.001 for the first 14.3T tokens, 0 after."""
    return 0.0 if tokens >= stop else speed
