"""SwiGLU, silu(gate) * up, with a gradient of few passes over memory.

With a limit, gate is min(gate, limit) and up is clamped to [-limit, limit] first, as in DeepSeek-V4
(`swiglu_limit`).
"""

import functools

import jax
import jax.numpy as jnp


def swiglu(
    gate_up: jax.Array, scale: jax.Array | None = None, axis: int = -1, limit: float = 0.0
) -> jax.Array:
    """silu(gate) * up * scale, computed in float32 and rounded once.

    Args:
      gate_up: gate, then up along `axis`, as in ...(2F).
      scale: float32, the shape of `gate_up` without `axis`; None for 1.
      limit: largest gate and magnitude of up; 0 for none.

    Returns:
      ...F in the dtype of `gate_up`.
    """
    if scale is None:
        shape = list(gate_up.shape)
        del shape[axis]
        scale = jnp.ones(shape, jnp.float32)
    return _swiglu(gate_up, scale, axis, limit)


# Autodiff would save silu(gate), its factors and the product: four arrays that forward writes and
# backward reads. This gradient computes them again from gate and up.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _swiglu(gate_up: jax.Array, scale: jax.Array, axis: int, limit: float) -> jax.Array:
    gate, up = _clamped(*_halves(gate_up, axis), limit)
    out = jax.nn.silu(gate) * up * jnp.expand_dims(scale, axis)
    return out.astype(gate_up.dtype)


_Operands = tuple[jax.Array, jax.Array]  # gate_up and scale


def _forward(
    gate_up: jax.Array, scale: jax.Array, axis: int, limit: float
) -> tuple[jax.Array, _Operands]:
    return _swiglu(gate_up, scale, axis, limit), (gate_up, scale)


def _backward(axis: int, limit: float, saved: _Operands, d_out: jax.Array) -> _Operands:
    gate_up, scale = saved
    raw, d_out = _halves(gate_up, axis), d_out.astype(jnp.float32)
    gate, up = _clamped(*raw, limit)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_scale = (d_out * silu * up).sum(axis)
    d_product = d_out * jnp.expand_dims(scale, axis)
    d_gate = d_product * up * (sigmoid + silu * (1 - sigmoid))  # silu' = s + g s (1 - s)
    d_up = d_product * silu
    if limit:  # what was clamped has no gradient; NaN was not
        d_gate = jnp.where(raw[0] > limit, 0.0, d_gate)
        d_up = jnp.where(jnp.abs(raw[1]) > limit, 0.0, d_up)
    d_gate_up = jnp.concatenate([d_gate, d_up], axis)
    return d_gate_up.astype(gate_up.dtype), d_scale


_swiglu.defvjp(_forward, _backward)


def _clamped(gate: jax.Array, up: jax.Array, limit: float) -> tuple[jax.Array, jax.Array]:
    if not limit:
        return gate, up
    return jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)


def _halves(gate_up: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=axis)
    return gate, up
