"""FP8 linear layers, dense and grouped, against float64 of the quantised and the whole operands."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from equations import tiles as equations

from deepseek_jax.precision import weight_gradients
from deepseek_jax.precision.fp8_weights import Linear
from deepseek_jax.precision.recipes import recipe

pytestmark = pytest.mark.usefixtures("strict_dtypes")

M, K, N = 200, 200, 136  # no size is a multiple of 128
SIZES = np.array([130, 0, 61], np.int32)  # the last 9 rows are padding

# Tiles made of other tiles, and not of the source, differ only with free scales: with powers of two
# both round to the same 4 bits, but for values that underflow.
scales = pytest.mark.parametrize("scales", ["power_of_two", "free"])


def normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantised(x, tile, scales):
    """x in float64 after E4M3 in tiles of this shape."""
    out = np.empty(x.shape, np.float64)
    for row in range(0, x.shape[0], tile[0]):
        for column in range(0, x.shape[1], tile[1]):
            at = np.s_[row : row + tile[0], column : column + tile[1]]
            values, scale = equations.quantise_tile(x[at], scales == "power_of_two")
            out[at] = values.astype(np.float64) * np.float64(scale)
    return out


def whole(x):
    return np.asarray(x, np.float64)


def close(got, want, whole, rounding=2**-8):
    """Within `rounding` of the quantised operands' product, and near that of the whole ones."""
    got = np.asarray(got, np.float64)
    np.testing.assert_allclose(got, want, rtol=rounding, atol=1e-5 * np.abs(want).max())
    assert np.linalg.norm(got - whole) < 0.06 * np.linalg.norm(whole)
    assert (got * whole).sum() > 0.998 * np.linalg.norm(got) * np.linalg.norm(whole)


def run(fp8, weight, linear, x, pull, product):
    """Output, gradient of the weight, gradient of x."""

    @jax.jit
    def all_three(weight, x, pull):
        prepared = fp8.prepare(weight, sensitive=False, linear=linear)
        out, vjp = weight_gradients.vjp(product, prepared, x)
        return out, *vjp(pull)

    bfloat16 = jnp.bfloat16
    return all_three(jnp.asarray(weight), jnp.asarray(x, bfloat16), jnp.asarray(pull, bfloat16))


def short(*shape, seed):
    """Numbers that bfloat16 holds, in float32."""
    return normal(*shape, seed=seed).astype(ml_dtypes.bfloat16).astype(np.float32)


@scales
def test_three_matmuls_of_a_linear_layer(scales):
    fp8, weight = recipe("fp8", scales), normal(K, N, seed=1)
    x, pull = short(M, K, seed=0), short(M, N, seed=2)

    def product(weight, x):
        return fp8.einsum("BSD,DF->BSF", x[None], weight)[0]

    out, d_weight, d_x = run(fp8, weight, Linear.whole("io", (K, N)), x, pull, product)
    blocks, rows, columns = quantised(weight, (128, 128), scales), (1, 128), (128, 1)
    close(out, quantised(x, rows, scales) @ blocks, whole(x) @ weight)
    close(d_x, quantised(pull, rows, scales) @ blocks.T, whole(pull) @ weight.T)
    assert d_weight.dtype == jnp.float32
    want = quantised(x, columns, scales).T @ quantised(pull, columns, scales)
    close(d_weight, want, whole(x).T @ pull, rounding=1e-4)


@scales
def test_three_matmuls_of_all_experts(scales):
    fp8, weight = recipe("fp8", scales), normal(len(SIZES), K, N, seed=1)
    x, pull = short(M, K, seed=0), short(M, N, seed=2)
    x[SIZES.sum() :] = np.nan  # padding is never read

    def product(weight, x):
        return fp8.grouped(x, weight, jnp.asarray(SIZES), M)

    linear = Linear.whole("-io", weight.shape)
    out, d_weight, d_x = run(fp8, weight, linear, x, pull, product)
    start, tile, column = 0, (1, 128), (128, 1)
    for expert, size in enumerate(SIZES):
        rows = np.s_[start : start + size]
        start += size
        if not size:
            np.testing.assert_array_equal(d_weight[expert], 0)
            continue
        blocks = quantised(weight[expert], (128, 128), scales)
        mine, theirs = x[rows], pull[rows]
        close(out[rows], quantised(mine, tile, scales) @ blocks, whole(mine) @ weight[expert])
        close(
            d_x[rows], quantised(theirs, tile, scales) @ blocks.T, whole(theirs) @ weight[expert].T
        )
        want = quantised(mine, column, scales).T @ quantised(theirs, column, scales)
        close(d_weight[expert], want, whole(mine).T @ theirs, rounding=1e-4)
    np.testing.assert_array_equal(out[start:].astype(jnp.float32), 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad):
    fp8, weight = recipe("fp8"), normal(K, N, seed=1)
    x, pull = short(M, K, seed=0), short(M, N, seed=2)
    x[3, 5] = bad

    def product(weight, x):
        return fp8.einsum("BSD,DF->BSF", x[None], weight)[0]

    out, d_weight, _ = run(fp8, weight, Linear.whole("io", (K, N)), x, pull, product)
    assert np.isnan(np.asarray(out[3], np.float32)).all()
    assert np.isnan(np.asarray(d_weight[5])).all()


def test_a_product_that_is_no_linear_layer_is_refused():
    fp8 = recipe("fp8")
    weight = fp8.prepare(
        jnp.ones((4, 3, 2)), sensitive=False, linear=Linear.whole("ioo", (4, 3, 2))
    )
    with pytest.raises(ValueError, match=r"precision\.recipe=bfloat16"):
        fp8.einsum("BSX,DHX->BSDH", jnp.ones((1, 5, 2), jnp.bfloat16), weight)
