"""Temperature and top-p against NumPy, and samples that depend on seed and position alone."""

import jax
import jax.numpy as jnp
import numpy as np

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
    scores[0, 0] = -np.inf
    got = jax.jit(sampling.most_likely)(jnp.asarray(scores))
    np.testing.assert_array_equal(got, scores.argmax(-1))
