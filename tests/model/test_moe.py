"""DeepSeekMoE against equation 12, with any dispatch and any placement of its experts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from equations import moe
from equations.norm import part
from published import layer, variant

from deepseek_jax.model.execution import Execution
from deepseek_jax.parallel.experts import dispatch
from deepseek_jax.parallel.experts.reference import ReferenceDispatch
from deepseek_jax.precision.payload import FP8_PAYLOAD, UNCHANGED_PAYLOAD

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def inputs(batch=2, length=20, seed=0):
    x = np.random.default_rng(seed).normal(size=(batch, length, 48))
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("rule", ["v3", "no_q_latent", "v2", "v2_lite", "moonlight", "v4_values"])
@pytest.mark.parametrize("way", [dispatch.EXACT, ReferenceDispatch(UNCHANGED_PAYLOAD)])
def test_follows_the_equation(rule, way):
    settings, weights, model = variant(rule)
    how, x = Execution(dispatch=way), inputs()
    got, _ = jax.jit(lambda m, x: m(x, how))(layer(model.moe_layers).feed, x)
    own = part(weights, "model.layers.1.mlp")
    want, routing = moe.mixture(np.asarray(x, np.float64), own, settings)
    assert routing.margin.min() > 1e-6
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("shape, every", [((1, 1), False), ((8, 2), True), ((8, 3), False)])
@pytest.mark.parametrize("payload", [UNCHANGED_PAYLOAD, FP8_PAYLOAD], ids=["as it is", "fp8"])
def test_a_step_of_decoding_computes_the_same(shape, every, payload):
    """Tokens are sorted by expert or, if few make many choices, go through every expert."""
    _, _, model = variant("v4_values")  # whose clamp both ways need
    how = Execution(dispatch=dataclasses.replace(dispatch.EXACT, payload=payload))
    feed, x = layer(model.moe_layers).feed, inputs(*shape)
    assert feed.runs_all_experts(math.prod(shape)) == every
    want = jax.jit(lambda m, x: m(x, how)[0])(feed, x)
    got = jax.jit(lambda m, x: m.decode(x, how))(feed, x)
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


def test_dense_feed_forward_follows_the_equation():
    _, weights, model = variant("v3")
    x = inputs()
    got = jax.jit(lambda m, x: m(x, Execution()))(layer(model.dense_layers).feed, x)
    want = moe.swiglu(np.asarray(x, np.float64), part(weights, "model.layers.0.mlp"))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def mixed(module, x):
    return module(x, Execution())[0]


@functools.cache
def alone():
    """(module, input, pull) on one device, and its value and gradients there."""
    _, _, model = variant("v3")
    given = layer(model.moe_layers).feed, inputs(4, 10), inputs(4, 10, seed=1)
    return given, jax.device_get(jax.jit(small.pulled, static_argnums=0)(mixed, *given))


@pytest.mark.parametrize(
    "sizes",
    [{"node": 2, "gpu": 2, "tensor": 2}, {"replica": 2, "tensor": 4}],
    ids=str,
)
def test_layout_changes_nothing(sizes):
    given, want = alone()
    small.assert_close(small.spread(mixed, *given, sizes), want, 3e-6)


def test_bias_gets_no_gradient_and_the_router_does():
    _, (_, grads, _) = alone()
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(grads)]
    assert not any("bias" in name for name in names)
    assert any("centroids" in name for name in names)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))
