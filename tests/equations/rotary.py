"""Rotary position embedding in interleaved pairs, and YaRN (section 4.3)."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def scaling(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The YaRN settings, None without; `rope_parameters` is the newer key of published configs."""
    found = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    return dict(found) if found.get("type", found.get("rope_type")) == "yarn" else None


def theta(settings: Mapping[str, Any]) -> float:
    return float(settings.get("rope_theta") or settings["rope_parameters"]["rope_theta"])


def correction_range(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Pairs up to `low` keep their speed, those from `high` on are slowed by the whole factor.

    c(r) = R ln(original / (2 pi r)) / (2 ln theta) is the pair that turns r times in the original
    length; the released code cuts both ends to [0, R - 1].
    """
    yarn, width = scaling(settings), settings["qk_rope_head_dim"]
    assert yarn is not None, "this model has no YaRN"
    original = yarn["original_max_position_embeddings"]

    def c(turns: float) -> float:
        return width * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta(settings)))

    low, high = math.floor(c(yarn["beta_fast"])), math.ceil(c(yarn["beta_slow"]))
    return max(low, 0), min(high, width - 1)


def frequencies(settings: Mapping[str, Any]) -> np.ndarray:
    """f'_j (R/2), radians per position."""
    width = settings["qk_rope_head_dim"]
    f = theta(settings) ** (-2 * np.arange(width // 2) / width)
    yarn = scaling(settings)
    if yarn is None:
        return f
    low, high = correction_range(settings)
    ramp = np.clip((np.arange(width // 2) - low) / ((high - low) or 0.001), 0, 1)
    return f * (1 - ramp) + f / yarn["factor"] * ramp


def magnitude(factor: float, mscale: float) -> float:
    """m = 0.1 mscale ln(factor) + 1: the report's sqrt(t), with mscale = 1."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def cos_sin_factor(settings: Mapping[str, Any]) -> float:
    """m(mscale) / m(mscale_all_dim), on cosines and sines; 1 for all released models."""
    yarn = scaling(settings)
    if yarn is None:
        return 1.0
    m = [magnitude(yarn["factor"], yarn.get(key, 0)) for key in ("mscale", "mscale_all_dim")]
    return m[0] / m[1]


def softmax_scale(settings: Mapping[str, Any]) -> float:
    """(N + R)^-1/2 m(mscale_all_dim)^2: multiplies the whole score, not its rotary part alone."""
    plain = (settings["qk_nope_head_dim"] + settings["qk_rope_head_dim"]) ** -0.5
    yarn = scaling(settings)
    return plain * (magnitude(yarn["factor"], yarn.get("mscale_all_dim", 0)) ** 2 if yarn else 1.0)


def rotate(x: np.ndarray, positions: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """x (..., T, R): the pair (x_2j, x_2j+1) times e^(i position f'_j), as one complex number."""
    turn = np.exp(1j * positions[:, None] * frequencies(settings)) * cos_sin_factor(settings)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)
