"""SwiGLU against autodiff of its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.precision.swiglu import swiglu


def formula(gate_up, scale, axis):
    gate, up = jnp.split(gate_up, 2, axis=axis)
    return jax.nn.silu(gate) * up * jnp.expand_dims(scale, axis)


@pytest.mark.parametrize("axis", [-1, 1])
def test_values_and_gradients_are_those_of_the_formula(axis):
    shape = (3, 8, 6)
    gate_up = 4 * jax.random.normal(jax.random.key(0), shape)
    scale = jax.random.normal(jax.random.key(1), np.delete(shape, axis))
    want, pull_want = jax.vjp(lambda x, s: formula(x, s, axis), gate_up, scale)
    got, pull_got = jax.vjp(lambda x, s: swiglu(x, s, axis), gate_up, scale)
    cotangent = jax.random.normal(jax.random.key(2), want.shape)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    for mine, autodiff in zip(pull_got(cotangent), pull_want(cotangent), strict=True):
        np.testing.assert_allclose(mine, autodiff, rtol=1e-5, atol=1e-5)


def test_without_a_scale_it_is_one():
    gate_up = jax.random.normal(jax.random.key(0), (5, 8), jnp.bfloat16)
    got, want = swiglu(gate_up), swiglu(gate_up, jnp.ones(5))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want)
