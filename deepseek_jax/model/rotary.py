"""Rotary position embedding (RoPE), and its YaRN extension (section 4.3).

Elements (2j, 2j+1) of a head form pair j, rotated by position * f_j as one complex number. In the
lightning indexer of V3.2, pair j is elements (j, j + R/2) instead.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig


def frequencies(config: ModelConfig) -> np.ndarray:
    """Frequencies f_j of the pairs, float64: theta^(-2j/R), lowered by YaRN for long wavelengths.

    Pairs that rotate more than `yarn_beta_fast` times in the original length keep f_j. Pairs that
    rotate less than `yarn_beta_slow` times get f_j / `yarn_factor`. Between, a linear ramp.
    """
    pairs = config.d_rope // 2
    plain = config.rope_theta ** (-np.arange(pairs) / pairs)
    if config.yarn_factor == 1.0:
        return plain

    def pair_of_rotations(count: float) -> float:
        ratio = math.log(config.yarn_original / (2 * math.pi * count))
        return config.d_rope * ratio / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_of_rotations(config.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_of_rotations(config.yarn_beta_slow)), config.d_rope - 1)
    ramp = np.clip((np.arange(pairs) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return plain * (1 - ramp) + plain / config.yarn_factor * ramp


def magnitude(factor: float, mscale: float) -> float:
    """Attention temperature of YaRN, sqrt(1/t): 0.1 * mscale * ln(factor) + 1; 1 if factor <= 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def attention_factor(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """Factor of cosines and sines under YaRN, of which queries and keys get one each."""
    if mscale and mscale_all_dim:
        return magnitude(factor, mscale) / magnitude(factor, mscale_all_dim)
    return magnitude(factor, 1.0)


def cos_sin(
    config: ModelConfig, positions: jax.Array, *, still: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Cosines and signed sines for `rotate` at integer positions ...: both ...(still + R) float32.

    The first `still` elements of a head have angle zero.
    """
    scale = attention_factor(config.yarn_factor, config.yarn_mscale, config.yarn_mscale_all_dim)
    speed = jnp.asarray(frequencies(config), jnp.float32)
    speed = speed.reshape((1,) * positions.ndim + speed.shape)
    angle = positions.astype(jnp.float32)[..., None] * speed
    cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale
    cos = jnp.repeat(cos, 2, axis=-1)
    sin = jnp.stack([-sin, sin], axis=-1).reshape(cos.shape)  # ...(R/2)2 -> ...R
    pad = (*[(0, 0)] * positions.ndim, (still, 0))
    return jnp.pad(cos, pad, constant_values=1.0), jnp.pad(sin, pad)


def softmax_scale(config: ModelConfig) -> float:
    """Factor of the attention scores: (N + R)^-1/2, times the squared YaRN magnitude."""
    scale = (config.d_nope + config.d_rope) ** -0.5
    if config.yarn_mscale_all_dim:
        scale *= magnitude(config.yarn_factor, config.yarn_mscale_all_dim) ** 2
    return scale


@jax.custom_vjp
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates each pair (a, b) of x ...X to (a cos - b sin, b cos + a sin); see `cos_sin`.

    The gradient of x is the inverse rotation; the angles have none.
    """
    wide = x.astype(jnp.float32)
    first = jnp.arange(-x.shape[-1], 0) % 2 == 0  # the pairs are whole from the end
    swapped = jnp.where(first, jnp.roll(wide, -1, -1), jnp.roll(wide, 1, -1))  # (a, b) -> (b, a)
    return (wide * cos + swapped * sin).astype(x.dtype)


def rotate_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates elements j and j + R/2 of x ...X, j < R/2, as one complex number; X - R rest still.

    The form of the lightning indexer, whose first R elements are rotary. `rotate` takes elements
    2j and 2j + 1 instead.

    Args:
      cos, sin: ...R, as `cos_sin` makes them for `rotate`.
    """
    cos, sin = cos[..., 1::2], sin[..., 1::2]  # one of each pair, and the sine without its sign
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    a, b, still = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    parts = a * cos - b * sin, b * cos + a * sin, still
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


_Angles = tuple[jax.Array, jax.Array]  # cos and sin of `rotate`


def _rotate_forward(x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, _Angles]:
    return rotate(x, cos, sin), (cos, sin)


def _rotate_backward(saved: _Angles, d_out: jax.Array) -> tuple[jax.Array, None, None]:
    cos, sin = saved
    return rotate(d_out, cos, -sin), None, None


rotate.defvjp(_rotate_forward, _rotate_backward)
