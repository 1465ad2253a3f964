"""RMSNorm against its equation, and properties of scale and dtype."""

import jax.numpy as jnp
import numpy as np
import pytest
from equations.norm import rms_norm

from deepseek_jax.model.norm import RMSNorm

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def made(width, eps, rng):
    norm = RMSNorm(width, eps=eps)
    gain = rng.normal(1, 0.3, width).astype(np.float32)
    norm.scale = norm.scale.replace(jnp.asarray(gain))
    return norm, gain


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.5])
def test_follows_the_equation(eps):
    rng = np.random.default_rng(0)
    norm, gain = made(24, eps, rng)
    x = rng.normal(0, 3, (2, 5, 24)).astype(np.float32)
    np.testing.assert_allclose(norm(jnp.asarray(x)), rms_norm(x.astype(float), gain, eps), 2e-6)


def test_computes_in_float32_and_returns_what_it_was_given():
    rng = np.random.default_rng(1)
    norm, gain = made(256, 1e-6, rng)
    x = jnp.asarray(rng.normal(0, 3, (2, 5, 256)), jnp.bfloat16)
    got = norm(x)
    assert got.dtype == jnp.bfloat16
    want = rms_norm(np.asarray(x, np.float64), gain, 1e-6)
    # One rounding to bfloat16 (8 bits of mantissa), at the very end.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8)


def test_does_not_see_the_scale_of_its_input():
    rng = np.random.default_rng(2)
    norm, _ = made(16, 1e-12, rng)
    x = jnp.asarray(rng.normal(size=(1, 3, 16)), jnp.float32)
    np.testing.assert_array_equal(norm(x), norm(x * 1024))  # a power of two: exact


def test_a_row_whose_squares_overflow_is_nan_and_no_other():
    norm, gain = made(16, 1e-6, np.random.default_rng(3))
    x = np.random.default_rng(4).normal(size=(1, 3, 16)).astype(np.float32)
    x[0, 1, 5] = 1e18
    want = norm(jnp.asarray(x))
    assert np.isfinite(want).all() and want[0, 1, 5] == pytest.approx(4 * gain[5], rel=1e-6)
    x[0, 1, 5] = 1e30
    got = norm(jnp.asarray(x))
    assert np.isnan(got[0, 1]).all()
    np.testing.assert_array_equal(got[0, ::2], want[0, ::2])
