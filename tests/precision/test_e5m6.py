"""E5M6 against its definition: all of its values, rounding to nearest, 12 bits a number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.precision import e5m6

encode = jax.jit(e5m6.encode)
decode = jax.jit(e5m6.decode, static_argnums=1)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def magnitudes():
    """All finite E5M6 magnitudes, in float64."""
    exponents, mantissas = np.arange(1, 31)[:, None] - 15.0, np.arange(64)
    normal = 2.0**exponents * (1 + mantissas / 64)
    return np.concatenate([2.0**-14 * mantissas / 64, normal.ravel()])


def nearest(x, known):
    return known[np.abs(x[..., None] - known).argmin(-1)]


def test_values_are_the_nearest_of_the_format():
    """In a tile with its largest in [2^14, 2^15) the scale is one."""
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 128)) * 2.0 ** random.integers(-25, 12, (64, 128))
    x[:, 0] = 2.0**14 * random.uniform(1, 1.99, 64)
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    known = magnitudes()
    got = np.asarray(decode(encode(jnp.asarray(x, jnp.bfloat16)), jnp.float32))
    error = np.abs(got - x)
    least = np.abs(np.abs(x) - nearest(np.abs(x), known))  # where two are as near, either will do
    assert np.isin(np.abs(got), known).all()
    normal = np.abs(x) >= 2.0**-14
    np.testing.assert_array_equal(error[normal], least[normal])
    assert (error <= np.maximum(2.0**-7 * np.abs(x), 2.0**-34 * 2**14)).all()
    assert 0.2 < normal.mean() < 0.8
    of_one = 2.0 ** np.floor(np.log2(np.abs(x[normal])))
    ties = error[normal] == 2.0**-7 * of_one
    assert ties.any() and not np.mod(np.abs(got[normal]) * 64 / of_one, 2)[ties].any()  # to even


@pytest.mark.parametrize("width", [16, 128, 200])
def test_every_value_returns_at_every_scale(width):
    """Exactly, in bfloat16 too; the last tile may be shorter. The least scale is of 10^-12."""
    random = np.random.default_rng(1)
    known = magnitudes()[: 29 * 64 + 64]  # below 2^15
    values = random.choice(known, (32, width)) * random.choice([-1, 1], (32, width))
    values[:, ::128] = 2.0**14
    scale = 2.0 ** random.integers(-50, 60, (32, 1))
    x = jnp.asarray(values * scale, jnp.bfloat16)
    packed = encode(x)
    np.testing.assert_array_equal(decode(packed, jnp.bfloat16), x)
    sizes = [part.shape[-1] for part in packed]
    assert sizes == [width, width // 2, -(-width // 128)]
    assert all(part.dtype == jnp.uint8 for part in packed)


def test_tiles_of_zeros_and_of_what_is_not_finite():
    x = jnp.ones((4, 256), jnp.bfloat16).at[0].set(0).at[1, 5].set(jnp.nan).at[2, 130].set(-jnp.inf)
    got = decode(encode(x), jnp.bfloat16)
    np.testing.assert_array_equal(got[0], 0)
    lost = np.isnan(np.asarray(got[1:3], np.float32)).reshape(2, 2, 128)
    assert lost.all(-1).tolist() == [[True, False], [False, True]] == lost.any(-1).tolist()
    np.testing.assert_array_equal(got[3], x[3])
