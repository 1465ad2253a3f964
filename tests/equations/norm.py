"""RMSNorm, and how weights are read: one part of a checkpoint, in float64."""

from collections.abc import Mapping

import numpy as np

LATENT_EPS = 1e-6  # of the two latent norms of attention, whatever `rms_norm_eps` says


def part(weights: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The arrays below `name`, under the rest of their names."""
    start = name + "."
    return {key[len(start) :]: value for key, value in weights.items() if key.startswith(start)}


def float64(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float64) for name, value in weights.items()}


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """gain * x / sqrt(mean(x^2) + eps), over the last axis."""
    return gain * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps)
