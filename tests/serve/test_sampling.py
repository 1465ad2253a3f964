"""Temperature and top-p against NumPy, and samples that depend on seed and position alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.serve import sampling
from deepseek_jax.serve.sampling import Settings


def settings(temperature, top_p, seed=None):
    seeds = np.arange(len(temperature)) if seed is None else seed
    numbers = (jnp.asarray(x, jnp.float32) for x in (temperature, top_p))
    return Settings(*numbers, jnp.asarray(seeds, jnp.uint32))


def test_distribution_is_the_nucleus_at_a_temperature():
    logits = np.random.default_rng(0).normal(size=(5, 3, 40)) * 2
    heat, share = [0.0, 0.5, 1.0, 1.0, 2.0], [1.0, 1.0, 0.3, 1e-6, 0.9]
    got = np.asarray(
        jax.jit(sampling.distribution)(jnp.asarray(logits, jnp.float32), settings(heat, share))
    )
    for request, (temperature, top_p) in enumerate(zip(heat, share, strict=True)):
        for row, own in zip(logits[request], got[request], strict=True):
            order = np.argsort(-row)
            want = np.zeros(40)
            if temperature == 0:
                want[order[0]] = 1
            else:
                p = np.exp((row - row.max()) / temperature)
                p /= p.sum()
                count = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
                want[order[:count]] = p[order[:count]]
                want /= want.sum()
            np.testing.assert_allclose(own, want, atol=2e-6)


def test_draws_depend_on_seed_and_position_alone():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 50)), jnp.float32)
    three = jnp.tile(logits, (3, 1))
    choose = jax.jit(sampling.choose)
    many = choose(three, settings([1, 0, 1], [1, 1, 1], [7, 7, 8]), jnp.array([5, 5, 5]))
    alone = choose(logits, settings([1], [1], [7]), jnp.array([5]))
    assert many[0] == alone[0] and many[1] == logits.argmax()
    drawn = [int(choose(logits, settings([1], [1], [7]), jnp.array([i]))[0]) for i in range(20)]
    assert len(set(drawn)) > 5


def test_the_first_of_the_most_likely_is_taken():
    scores = np.random.default_rng(0).integers(0, 4, (3, 5, 9)).astype(np.float32)
    scores[0, 0, 3:] = -np.inf
    got = jax.jit(sampling.most_likely)(jnp.asarray(scores))
    np.testing.assert_array_equal(got, scores.argmax(-1))


COLD = [1e-7, 1e-8, 1e-9, 1e-10, 1e-12, 1e-30, 1e-37, 1e-38, 1e-45, 1e-320]


@pytest.mark.parametrize("top_p", [1.0, 1 - 1e-9, 0.9, 1e-9, 1e-38, 1e-45, 1e-320])
def test_a_temperature_near_0_is_greedy(top_p):
    """Ties included: the first of the most likely tokens, as at temperature 0."""
    logits = np.random.default_rng(0).normal(size=(len(COLD), 320)).astype(np.float32) * 3
    logits[:, 300] = logits.max(-1)
    own = settings(COLD, [top_p] * len(COLD))
    got = jax.jit(sampling.choose)(logits, own, jnp.arange(len(COLD)))
    np.testing.assert_array_equal(got, logits.argmax(-1))
    probabilities = jax.jit(sampling.distribution)(logits, own)
    np.testing.assert_array_equal(probabilities, np.eye(320)[logits.argmax(-1)])


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-6, 1.0, sampling.HOTTEST])
@pytest.mark.parametrize("top_p", [1.0, 1e-45])
def test_probabilities_of_wide_logits_are_finite(temperature, top_p):
    logits = np.array([[1.0, 3e38, -3e38, -np.inf, 0.0]], np.float32)
    got = sampling.distribution(jnp.asarray(logits), settings([temperature], [top_p]))[0]
    np.testing.assert_array_equal(got, [0, 1, 0, 0, 0])


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1.0])
def test_logits_that_are_not_finite_give_no_token(bad, temperature):
    """The id that is returned is past the vocabulary; the neighbour gets its own token."""
    logits = np.random.default_rng(0).normal(size=(2, 40)).astype(np.float32)
    logits[0, 7] = bad
    own = settings([temperature, 0], [0.9, 1])
    got = jax.jit(sampling.choose)(logits, own, jnp.arange(2))
    assert got.tolist() == [40, logits[1].argmax()]
    probabilities = jax.jit(sampling.distribution)(logits, own)
    assert np.isnan(probabilities[0]).all() and np.isfinite(probabilities[1]).all()
    none = jnp.full((1, 40), -jnp.inf)
    assert sampling.choose(none, settings([temperature], [1]), jnp.arange(1)).tolist() == [40]


def test_a_neighbour_with_a_nucleus_changes_nothing():
    """Running sums of many probabilities round to more than 1."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 100_003)) * 0.01, jnp.float32)
    alone = sampling.distribution(logits, settings([1], [1]))
    beside = sampling.distribution(jnp.tile(logits, (2, 1)), settings([1, 1], [1, 0.5]))
    np.testing.assert_array_equal(beside[0], alone[0])
