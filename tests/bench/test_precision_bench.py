"""`bench precision`: its arithmetic, its ablations, and what a second call makes again."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small

from deepseek_jax.bench import precision, precision_plot, precision_runs
from deepseek_jax.bench.precision_ablations import SHORT_SUMS, TENSOR_SCALES, cut
from deepseek_jax.config import ConfigError

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(ml_dtypes.bfloat16).astype(np.float32)


def run(loss, held_out):
    return {"steps": 400, "loss": [loss] * 40, "mtp_loss": [loss] * 40, "held_out_loss": held_out}


def e4m3(x, scale):
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def of_tensor(x):
    return e4m3(x, np.abs(x).max() / np.float32(448))


def pulled(recipe, subscripts, x, weight, d_out):
    out, pull = jax.vjp(
        lambda x, w: recipe.einsum(subscripts, x, w), jnp.asarray(x, jnp.bfloat16), weight
    )
    return [np.asarray(a, np.float64) for a in (out, *pull(jnp.asarray(d_out, jnp.bfloat16)))]


def test_one_scale_for_each_tensor():
    """All three products against float64, each operand rounded under one scale."""
    x, w, d_out = normal(40, 160), normal(160, 2, 24), normal(40, 2, 24)
    out, d_x, d_w = pulled(TENSOR_SCALES, "MD,DHK->MHK", x, jnp.asarray(w), d_out)
    x, w, d_out = of_tensor(x), of_tensor(w), of_tensor(d_out)
    for got, want, rtol in (
        (out, np.einsum("MD,DHK->MHK", x, w), 2**-8),  # bfloat16
        (d_x, np.einsum("MHK,DHK->MD", d_out, w), 2**-8),
        (d_w, np.einsum("MD,MHK->DHK", x, d_out), 1e-6),
    ):
        assert np.abs(got - want).max() <= rtol * np.abs(want).max()


def test_a_cut_sum_keeps_fourteen_bits():
    values = np.float32([1 + 2**-13, 1 + 2**-14, -1 - 2**-13 - 2**-14, 3e-7, 0.0])
    want = np.float32([1 + 2**-13, 1, -1 - 2**-13, 0, 0])
    got = np.asarray(cut(jnp.asarray(values)))
    np.testing.assert_array_equal(got[[0, 1, 2, 4]], want[[0, 1, 2, 4]])
    assert 0 < 1 - got[3] / values[3] < 2**-13
    assert np.isnan(np.asarray(cut(jnp.float32(np.nan))))


def test_short_sums_lose_what_float32_sums_keep():
    """A 1 and then 159 numbers of 2^-15: groups of 32 make 2^-10 and are kept, single ones are not.

    With 31 numbers beside zeros in each group, the sum of a group is 31 * 2^-15 cut to 2^-13.
    """
    x = np.zeros((1, 160), np.float32)
    x[0, :32] = [1.0] + [0.0] * 31
    x[0, 32::32] = 2.0**-7  # one number in each of four groups
    w = np.ones((160, 1), np.float32)
    w[32:] = 2.0**-7  # products of 2^-14: half of the last kept bit
    out, _, _ = pulled(SHORT_SUMS, "MD,DF->MF", x, jnp.asarray(w), np.ones((1, 1), np.float32))
    assert out == 1
