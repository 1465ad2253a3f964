"""SwiGLU against autodiff of its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.precision import fp8_sources
from deepseek_jax.precision.linear_input import SwiGLU, numbers
from deepseek_jax.precision.swiglu import swiglu


def formula(gate_up, scale, axis, limit):
    gate, up = jnp.split(gate_up, 2, axis=axis)
    if limit:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up * jnp.expand_dims(scale, axis)


@pytest.mark.parametrize("limit", [0.0, 2.5])
@pytest.mark.parametrize("axis", [-1, 1])
def test_values_and_gradients_are_those_of_the_formula(axis, limit):
    shape = (3, 8, 6)
    gate_up = 4 * jax.random.normal(jax.random.key(0), shape)
    scale = jax.random.normal(jax.random.key(1), np.delete(shape, axis))
    want, pull_want = jax.vjp(lambda x, s: formula(x, s, axis, limit), gate_up, scale)
    got, pull_got = jax.vjp(lambda x, s: swiglu(x, s, axis, limit), gate_up, scale)
    cotangent = jax.random.normal(jax.random.key(2), want.shape)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    for mine, autodiff in zip(pull_got(cotangent), pull_want(cotangent), strict=True):
        np.testing.assert_allclose(mine, autodiff, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [0, 2], ids=["gate", "up"])
def test_a_clamp_takes_no_gradient_of_what_is_no_number(place):
    """NaN is not above the limit: it must reach the norm of gradients, which stops the run."""
    gate_up = jnp.ones((1, 4)).at[0, place].set(jnp.nan)

    def gradient(limit):
        return jax.vjp(lambda x: swiglu(x, limit=limit), gate_up)[1](jnp.ones((1, 2)))[0]

    assert jnp.isnan(gradient(2.5)[0, 0])
    np.testing.assert_array_equal(gradient(2.5), gradient(0.0))


def test_without_a_scale_it_is_one():
    gate_up = jax.random.normal(jax.random.key(0), (5, 8), jnp.bfloat16)
    got, want = swiglu(gate_up), swiglu(gate_up, jnp.ones(5))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want)


def test_a_clamp_is_never_left_to_a_kernel_without_one():
    """The quantiser that computes SwiGLU itself is given nothing; the numbers are clamped."""
    gate_up = 4 * jax.random.normal(jax.random.key(0), (5, 512), jnp.bfloat16)
    assert fp8_sources.source_of(SwiGLU(gate_up), 256, True) is not None
    assert fp8_sources.source_of(SwiGLU(gate_up, limit=2.5), 256, True) is None
    assert (
        np.abs(numbers(SwiGLU(gate_up, limit=2.5))).max() <= 2.5**2 < np.abs(swiglu(gate_up)).max()
    )
