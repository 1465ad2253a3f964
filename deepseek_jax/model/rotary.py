"""Rotary position embedding, interleaved pairs, and its YaRN extension (section 4.3).

Elements (2j, 2j+1) of a head form pair j, turned by position * f_j as one complex number.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig


def frequencies(config: ModelConfig) -> np.ndarray:
    """f_j, float64, one per pair: theta^(-2j/R), slowed by YaRN where the wavelength is long.

    Pairs that turn more than `yarn_beta_fast` times within the original length keep their speed, those
    that turn less than `yarn_beta_slow` times are slowed `yarn_factor` times, linear between.
    """
    pairs = config.d_rope // 2
    plain = config.rope_theta ** (-np.arange(pairs) / pairs)
    if config.yarn_factor == 1.0:
        return plain

    def pair_that_turns(times: float) -> float:
        turns = math.log(config.yarn_original / (2 * math.pi * times))
        return config.d_rope * turns / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(config.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.yarn_beta_slow)), config.d_rope - 1)
    ramp = np.clip((np.arange(pairs) - low) / max(high - low, 0.001), 0.0, 1.0)
    return plain * (1 - ramp) + plain / config.yarn_factor * ramp


def magnitude(factor: float, mscale: float) -> float:
    """YaRN's sqrt(1/t): 0.1 * mscale * ln(factor) + 1, or 1 without extension."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def cos_sin(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines SR/2 in float32 for integer positions S."""
    if config.yarn_mscale and config.yarn_mscale_all_dim:
        scale = magnitude(config.yarn_factor, config.yarn_mscale) / magnitude(
            config.yarn_factor, config.yarn_mscale_all_dim
        )
    else:
        scale = magnitude(config.yarn_factor, 1.0)
    speed = jnp.asarray(frequencies(config), jnp.float32)
    angle = positions.astype(jnp.float32)[:, None] * speed[None]
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def softmax_scale(config: ModelConfig) -> float:
    """(N + R)^-1/2, times the squared YaRN magnitude, which scales the whole score."""
    scale = (config.d_nope + config.d_rope) ** -0.5
    if config.yarn_mscale_all_dim:
        scale *= magnitude(config.yarn_factor, config.yarn_mscale_all_dim) ** 2
    return scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns each pair of x (..., S, heads, R) by its angle; cos and sin are S1R/2-like, float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)  # R -> (R/2)2
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
