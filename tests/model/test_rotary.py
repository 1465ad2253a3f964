"""Rotary embedding and YaRN against the equations, up to and past the original length."""

import jax.numpy as jnp
import numpy as np
import pytest
from equations import checkpoints, rotary
from published import model_config

from deepseek_jax.model import rotary as ours

pytestmark = pytest.mark.usefixtures("strict_dtypes")
RULES = ["v3", "yarn", "yarn_v2", "yarn_ratio"]


@pytest.mark.parametrize("rule", RULES)
def test_frequencies_and_scales_follow_the_equations(rule):
    settings, _ = checkpoints.make(rule)
    config = model_config(settings)
    np.testing.assert_allclose(ours.frequencies(config), rotary.frequencies(settings), 1e-12)
    np.testing.assert_allclose(ours.softmax_scale(config), rotary.softmax_scale(settings), 1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_rotation_follows_the_equation(rule):
    settings, _ = checkpoints.make(rule)
    config = model_config(settings)
    positions = np.arange(0, 256, 5)
    x = np.random.default_rng(0).normal(size=(2, 52, 8)).astype(np.float32)
    cos, sin = ours.cos_sin(config, jnp.asarray(positions))
    got = ours.rotate(jnp.asarray(x), cos[None], sin[None])
    want = rotary.rotate(x.astype(float), positions, settings)
    # Angles are position times a float32 frequency: 256 radians times 2^-24.
    np.testing.assert_allclose(got, want, atol=6e-5)


@pytest.mark.parametrize("still", [5, 6])
def test_the_still_part_does_not_turn(still):
    """Neither an even nor an odd one moves the pairs of the rest."""
    config = model_config(checkpoints.make("yarn_ratio")[0])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, still + 8)), jnp.float32)
    positions = jnp.arange(9)
    cos, sin = ours.cos_sin(config, positions, still=still)
    got = ours.rotate(x, cos[None], sin[None])
    np.testing.assert_array_equal(got[..., :still], x[..., :still])
    cos, sin = ours.cos_sin(config, positions)
    want = ours.rotate(x[..., still:], cos[None], sin[None])
    np.testing.assert_array_equal(got[..., still:], want)


def test_scores_depend_on_the_distance_alone():
    config = model_config(checkpoints.make("v3")[0])
    rng = np.random.default_rng(3)
    query, key = (jnp.asarray(rng.normal(size=8), jnp.float32) for _ in range(2))

    def score(i, j):
        (ci, cj), (si, sj) = ours.cos_sin(config, jnp.asarray([i, j]))
        return float(ours.rotate(query, ci, si) @ ours.rotate(key, cj, sj))

    for shift in (1, 30, 100):
        assert score(7 + shift, 3 + shift) == pytest.approx(score(7, 3), abs=5e-5)
