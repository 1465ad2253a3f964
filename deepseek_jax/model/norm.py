"""RMSNorm, computed in float32."""

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
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * inverse_rms * scale).astype(x.dtype)
