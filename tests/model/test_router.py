"""Router: every rule against the equations, balance loss against finite differences, bounds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import checkpoints, router
from equations.norm import part
from hypothesis import given, settings
from hypothesis import strategies as st
from published import layer, model_config, variant

from deepseek_jax.model import router as ours

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def in_order(experts, weights):
    order = np.argsort(experts, -1)
    return np.take_along_axis(experts, order, -1), np.take_along_axis(weights, order, -1)


@pytest.mark.parametrize(
    "rule, changes",
    [
        ("v3", {}),
        ("no_q_latent", {}),  # biases near -0.8: a mask of 0 would choose dropped groups
        ("v2", {}),
        ("v2_lite", {}),
        ("moonlight", {}),
        ("v3", {"norm_topk_prob": False}),
        ("v2", {"norm_topk_prob": True, "routed_scaling_factor": 0.7}),
        ("v3", {"scoring_func": "softmax", "num_experts_per_tok": 8}),
        ("v3", {"topk_group": 4}),
    ],
)
def test_follows_the_equations(rule, changes):
    config, weights, model = variant(rule, **changes)
    x = np.random.default_rng(0).normal(size=(2, 64, 48)).astype(np.float32)
    got = jax.jit(lambda m, x: m(x))(layer(model.moe_layers).feed.router, jnp.asarray(x))
    want = router.route(x.astype(float), part(weights, "model.layers.1.mlp"), config)
    assert want.margin.min() > 1e-6  # float32 and float64 choose alike
    experts, gates = in_order(np.asarray(got.experts), np.asarray(got.weights))
    np.testing.assert_array_equal(experts, want.experts)
    np.testing.assert_allclose(gates, want.weights, rtol=2e-5)
    np.testing.assert_array_equal(got.load, want.load)
    np.testing.assert_allclose(got.balance, want.balance.sum(), rtol=2e-5)


def test_dropped_groups_stay_out_when_every_steered_score_is_negative():
    config = model_config(checkpoints.make("v3")[0])
    config = dataclasses.replace(config, experts=8, groups=4, top_groups=1, top_k=2)
    scores = jnp.full((1, 1, 8), 0.1).at[0, 0, 5].set(0.4)
    experts, _ = ours.select_experts(scores, jnp.full((8,), -3.0), config)
    assert set(np.asarray(experts).ravel().tolist()) == {4, 5}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    groups=st.sampled_from([1, 2, 4, 8]),
    data=st.data(),
    score=st.sampled_from(["sigmoid", "softmax", "sqrtsoftplus"]),
    rule=st.sampled_from(["top2", "max"]),
)
def test_choice_keeps_its_bounds(seed, groups, data, score, rule):
    """Distinct experts on at most top_groups groups, whose weights sum to the routed scale."""
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, min(16 // groups * top_groups, 6)))
    config = dataclasses.replace(
        model_config(checkpoints.make("v3")[0]), groups=groups, top_groups=top_groups, top_k=top_k,
        score=score, group_score=rule, normalise_weights=True,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(0, 3, (2, 5, 16)), jnp.float32)
    scores = ours._SCORES[score](logits)
    bias = jnp.asarray(rng.normal(0, 2, 16), jnp.float32)
    experts, weights = (np.asarray(x) for x in ours.select_experts(scores, bias, config))
    for chosen in experts.reshape(-1, top_k):
        assert len(set(chosen)) == top_k
        assert len(set(chosen // (16 // groups))) <= top_groups
    np.testing.assert_allclose(weights.sum(-1), config.routed_scale, rtol=1e-5)


def test_sqrt_softplus_is_finite_everywhere():
    """Value and gradient against float64, also where e^x underflows or overflows in float32."""
    x = np.array([-150, -104, -88, -20.5, -20, -19.5, -1, 0, 3, 88, 1e4])
    scores, slopes = jax.vmap(jax.value_and_grad(ours.sqrt_softplus))(jnp.asarray(x, jnp.float32))
    want = router.affinities(x, {"scoring_func": "sqrtsoftplus"})
    np.testing.assert_allclose(scores, want, rtol=3e-6)
    sigmoid = np.exp(-np.logaddexp(0, -x))
    np.testing.assert_allclose(slopes, sigmoid / (2 * want), rtol=3e-6)


def test_bias_steers_the_choice_and_never_the_weight():
    config = model_config(checkpoints.make("moonlight")[0])
    config = dataclasses.replace(config, normalise_weights=False, routed_scale=1.0)
    scores = jax.nn.sigmoid(jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 16))))
    scores = scores.astype(jnp.float32)
    bias = jnp.zeros(16).at[3].set(10.0)
    experts, weights = ours.select_experts(scores, bias, config)
    assert (np.asarray(experts) == 3).any(-1).all()
    np.testing.assert_array_equal(weights, jnp.take_along_axis(scores, experts, -1))


def test_sequence_balance_and_its_gradient():
    """Value against the equation; gradient against a float64 central difference."""
    rng = np.random.default_rng(0)
    scores = 1 / (1 + np.exp(-rng.normal(size=(3, 10, 16))))
    value, grad = jax.value_and_grad(ours.sequence_balance)(jnp.asarray(scores, jnp.float32), 4)
    assert float(value) == pytest.approx(router.sequence_balance(scores, 4).sum(), rel=1e-5)
    for _ in range(5):
        along, step = rng.normal(size=scores.shape), 1e-6  # moves no top-k choice
        ahead, behind = (
            router.sequence_balance(scores + s * step * along, 4).sum() for s in (1, -1)
        )
        want = (ahead - behind) / (2 * step)
        assert float(np.sum(np.asarray(grad, float) * along)) == pytest.approx(want, abs=2e-6)


def test_perfect_balance_is_one_per_sequence():
    scores = jnp.asarray(np.eye(8)[np.arange(16) % 8][None] * 0.5 + 0.1, jnp.float32)
    assert float(ours.sequence_balance(scores, 1)) == pytest.approx(1.0, rel=1e-6)


def test_max_violation_and_bias_follow_the_equations():
    rng = np.random.default_rng(0)
    load = rng.integers(0, 50, (3, 8)).astype(np.float32)
    load[0] = 7  # in balance: nothing moves
    bias = rng.normal(size=(3, 8)).astype(np.float32)
    violation = ours.max_violation(jnp.asarray(load))
    np.testing.assert_allclose(violation, router.max_violation(load.astype(float)), rtol=1e-6)
    moved = ours.move_bias(jnp.asarray(bias), jnp.asarray(load), jnp.float32(0.01))
    want = router.move_bias(bias.astype(float), load.astype(float), 0.01)
    np.testing.assert_allclose(moved, want, rtol=1e-6)
    np.testing.assert_array_equal(moved[0], bias[0])
