"""The whole model against the equations, with the golden sizes of the published one."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from equations import checkpoints
from equations.model import forward
from published import variant

from configs import v3_671b
from deepseek_jax import config as configs
from deepseek_jax.model import params
from deepseek_jax.model.count import count
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.transformer import abstract_model


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("rule", ["v3", "no_q_latent", "yarn", "v2", "v2_lite", "moonlight"])
def test_logits_follow_the_equations(rule):
    settings, weights, model = variant(rule)
    tokens = checkpoints.tokens(settings)
    want = forward(settings, weights, tokens)
    assert min(routing.margin.min() for routing in want.routing.values()) > 1e-6
    logits, hidden = jax.jit(lambda m, t: m(t, Execution()))(model, jnp.asarray(tokens))
    np.testing.assert_allclose(logits[0], want.logits, atol=2e-4)
    np.testing.assert_allclose(hidden.heads[0], want.final_norm, atol=2e-4)
    for i, routing in enumerate(want.routing.values()):
        got = np.sort(np.asarray(hidden.routing.experts[i]), -1)
        np.testing.assert_array_equal(got, routing.experts)


def test_unrolled_layers_change_nothing():
    settings, _, model = variant("v3")
    tokens = jnp.asarray(checkpoints.tokens(settings, length=12))
    one, two = (model(tokens, Execution(unroll=n))[0] for n in (1, 2))
    np.testing.assert_allclose(two, one, atol=2e-5)


@pytest.mark.usefixtures("strict_dtypes")
def test_bfloat16_stays_near_float32_and_routes_in_float32():
    from deepseek_jax.precision.recipes import BFLOAT16

    settings, _, model = variant("v3")
    tokens = jnp.asarray(checkpoints.tokens(settings, length=12))
    how = Execution(recipe=BFLOAT16)
    low = params.prepare(model, BFLOAT16)
    assert low.moe_layers.feed.router.centroids[...].dtype == jnp.float32
    assert low.norm.scale[...].dtype == jnp.float32
    assert low.head.table[...].dtype == jnp.bfloat16
    # One dense layer, so that no expert is chosen otherwise: 8 bits of mantissa, a dozen products.
    got = low.embedding(tokens, how)
    first = jax.tree.map(lambda x: x[0], low.dense_layers)
    got, *_ = first(got, how)
    full = jax.tree.map(lambda x: x[0], model.dense_layers)
    want, *_ = full(model.embedding(tokens, Execution()), Execution())
    assert got.dtype == jnp.bfloat16
    error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    assert 1e-5 < float(error) < 0.02


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"tensor": 4, "gpu": 2}], ids=str)
def test_splitting_the_vocabulary_of_the_table_changes_nothing(sizes):
    settings, _, model = variant("v3")
    tokens = jnp.asarray(checkpoints.tokens(settings, batch=2, length=10))
    pull = jnp.asarray(np.random.default_rng(0).normal(size=(2, 10, 48)), jnp.float32)

    def fn(table, position):  # integers have no gradient, so they are passed as floats
        return table(position.astype(jnp.int32), Execution())

    ids = tokens.astype(jnp.float32)
    want = jax.device_get(small.pulled(fn, model.embedding, ids, pull))
    small.assert_close(small.spread(fn, model.embedding, ids, pull, sizes)[:2], want[:2], 1e-6)


def test_golden_sizes_of_the_published_model():
    start = time.perf_counter()
    config = configs.parse(v3_671b.get_config()).model
    counted = count(config)
    seconds = time.perf_counter() - start
    assert counted.total == 671_026_419_200
    assert counted.activated == 37_552_297_472
    assert counted.mtp == 11_610_068_224
    assert seconds < 5


def test_golden_size_of_one_attention_layer():
    config = configs.parse(v3_671b.get_config()).model
    model = abstract_model(config)
    sizes = {
        weight.path: np.prod(weight.shape[1:], dtype=np.int64)
        for weight in params.describe(model)
        if weight.path.startswith("dense_layers.attention.") and "norm" not in weight.path
    }
    assert sum(sizes.values()) == 187_105_280
