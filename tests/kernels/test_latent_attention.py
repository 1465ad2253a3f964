"""Absorbed attention's kernel in JAX's interpreter, against float64, at ragged lengths."""

import functools

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels import latent_attention

pytestmark = pytest.mark.usefixtures("strict_dtypes")

B, S, H, C, R, T = 2, 2, 24, 128, 64, 384
SCALE = 0.1


def on_a_fresh_accumulator(total, product):
    """The interpreter's form of `latent_attention.accumulate`."""

    def run(accumulator):
        product(accumulator)
        return total + accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(total.shape, jnp.float32))


def operands():
    random = np.random.default_rng(0)
    shapes = (B, S, H, C), (B, S, H, R), (B, T, C), (B, T, R)
    return [jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in shapes]


def in_float64(query, query_rope, latent, key_rope, positions):
    wide = [np.asarray(each, np.float64) for each in (query, query_rope, latent, key_rope)]
    query, query_rope, latent, key_rope = wide
    scores = np.einsum("BSHC,BTC->BSHT", query, latent)
    scores = SCALE * (scores + np.einsum("BSHR,BTR->BSHT", query_rope, key_rope))
    past = np.arange(T) <= np.asarray(positions)[..., None, None]
    scores = np.where(past, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("BSHT,BTC->BSHC", weights / weights.sum(-1, keepdims=True), latent)


@pytest.mark.parametrize("splits", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_means_are_those_of_float64(splits, monkeypatch):
    """One request fills three steps of each part; of the other, a part has no position at all.

    Parts and results are rounded to bfloat16, 2^-9 of them each; the largest latent is below 4.
    """
    monkeypatch.setattr(latent_attention, "accumulate", on_a_fresh_accumulator)
    kernel = functools.partial(
        latent_attention.attend, scale=SCALE, splits=splits, interpret=interpreted.GPU
    )
    given, positions = operands(), jnp.array([[379, 380], [9, 3]], jnp.int32)
    # Positions that no token sees may hold anything finite.
    given[2] = given[2].at[1, 10:].set(1e4)
    got = interpreted.run(jax.jit(kernel), *given, positions)
    want = in_float64(*given, positions)
    error = 2 * 2**-9 * 4
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=error, rtol=0)
    other = in_float64(*given, positions - 1)  # a token that sees one position less
    assert (np.abs(other - want).max((2, 3)) > error).all()


@pytest.mark.parametrize(
    ("requests", "rows", "length", "splits"),
    [
        (128, 128, 4096, 1),  # 256 thread blocks: more than SMs
        (8, 256, 4096, 4),  # 32 x 4 = 128 of 132 SMs
        (1, 128, 32_768, 64),  # one request: 64 parts of 512 positions
        (1, 128, 512, 1),  # too short to share out
    ],
)
def test_parts_fill_the_gpu(requests, rows, length, splits):
    assert latent_attention.splits_for(requests, rows, length) == splits


@pytest.mark.parametrize(
    ("length", "width", "narrow", "dtype", "taken"),
    [
        (4096, 512, 64, jnp.bfloat16, True),
        (4100, 512, 64, jnp.bfloat16, False),
        (4096, 576, 64, jnp.bfloat16, False),
        (4096, 512, 32, jnp.bfloat16, False),
        (4096, 512, 64, jnp.float32, False),
    ],
)
def test_shapes_that_it_takes(length, width, narrow, dtype, taken):
    query = jax.ShapeDtypeStruct((2, 1, 4, width), dtype)
    cache = [jax.ShapeDtypeStruct((2, length, w), dtype) for w in (width, narrow)]
    assert latent_attention.takes(query, *cache) == taken
