"""RMSNorm, and LayerNorm for the indexer's keys, computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model import params


class RMSNorm(nnx.Module):
    """Normalisation x / rms(x) * scale over the last axis, in the dtype of x."""

    def __init__(self, width: int, *, eps: float, axis: str | None = "model"):
        self.scale = params.ones((axis, width))
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        # NaN where the squares, or their sum, overflow: 1 / sqrt(infinity) is 0, and rows of zeros
        # would hide numbers of 1.8e19 and more. A sum, since its gradient needs nothing kept.
        overflow = jnp.where(jnp.isfinite(jax.lax.stop_gradient(square)), 0.0, jnp.nan)
        inverse_rms = jax.lax.rsqrt(square + self.eps) + overflow
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * inverse_rms * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalisation (x - mean) / sqrt(variance + eps) * scale + bias over the last axis."""

    def __init__(self, width: int, *, eps: float, axis: str | None):
        self.scale = params.ones((axis, width))
        self.bias = params.zeros((axis, width))
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        scale, bias = (
            part[...].reshape((1,) * (x.ndim - 1) + (-1,)) for part in (self.scale, self.bias)
        )
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(x.dtype)
