"""SwiGLU, silu(gate) * up, with a gradient of few passes over memory."""

import functools

import jax
import jax.numpy as jnp


def swiglu(gate_up: jax.Array, scale: jax.Array | None = None, axis: int = -1) -> jax.Array:
    """silu(gate) * up * scale, computed in float32 and rounded once.

    Args:
      gate_up: gate, then up along `axis`, as in ...(2F).
      scale: float32, the shape of `gate_up` without `axis`; None for 1.

    Returns:
      ...F in the dtype of `gate_up`.
    """
    if scale is None:
        shape = list(gate_up.shape)
        del shape[axis]
        scale = jnp.ones(shape, jnp.float32)
    return _swiglu(gate_up, scale, axis)


# Autodiff would save silu(gate), its factors and the product: four arrays that forward writes and
# backward reads. This gradient computes them again from gate and up.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _swiglu(gate_up: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
    gate, up = _halves(gate_up, axis)
    out = jax.nn.silu(gate) * up * jnp.expand_dims(scale, axis)
    return out.astype(gate_up.dtype)


_Operands = tuple[jax.Array, jax.Array]  # gate_up and scale


def _forward(gate_up: jax.Array, scale: jax.Array, axis: int) -> tuple[jax.Array, _Operands]:
    return _swiglu(gate_up, scale, axis), (gate_up, scale)


def _backward(axis: int, saved: _Operands, d_out: jax.Array) -> _Operands:
    gate_up, scale = saved
    (gate, up), d_out = _halves(gate_up, axis), d_out.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_scale = (d_out * silu * up).sum(axis)
    d_product = d_out * jnp.expand_dims(scale, axis)
    d_gate = d_product * up * (sigmoid + silu * (1 - sigmoid))  # silu' = s + g s (1 - s)
    d_gate_up = jnp.concatenate([d_gate, d_product * silu], axis)
    return d_gate_up.astype(gate_up.dtype), d_scale


_swiglu.defvjp(_forward, _backward)


def _halves(gate_up: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=axis)
    return gate, up
