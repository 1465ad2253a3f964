"""Lightning indexer: rotation, scores against equation 1, and the choice of positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import indexer
from equations.norm import part
from published import layer, variant

from deepseek_jax.model.execution import Execution
from deepseek_jax.model.indexer import (
    among_the_largest,
    chosen_positions,
    hadamard,
    index_scores,
    rotated_by_hadamard,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.parametrize("width", [1, 8, 12, 128])
def test_hadamard_rotation_changes_no_product(width):
    matrix = hadamard(width)
    run = width & -width
    np.testing.assert_array_equal(matrix @ matrix.T, run * np.eye(width))
    a, b = np.random.default_rng(0).normal(size=(2, 5, width)).astype(np.float32)
    turned = np.sum(rotated_by_hadamard(jnp.asarray(a)) * rotated_by_hadamard(jnp.asarray(b)), -1)
    np.testing.assert_allclose(turned, (a * b).sum(-1), atol=1e-5 * width**0.5)


@pytest.mark.parametrize("length", [6, 40])
def test_positions_are_those_of_the_largest_scores_of_equation_1(length):
    """For few queries and for many, whose products are made in two ways."""
    settings, weights, model = variant("v32")
    settings["index_topk"] = top_k = 5
    module = layer(model.moe_layers, 1).attention
    x = np.random.default_rng(0).normal(size=(2, length, 48))
    object.__setattr__(module.config, "index_top_k", top_k)
    found = jax.jit(lambda m, x: m.selected(x, Execution()))(module, jnp.asarray(x, jnp.float32))
    own = part(weights, "model.layers.2.self_attn")
    want = indexer.selected(indexer.scores(x, own, settings), top_k)
    for batch, query in np.ndindex(2, length):
        positions = [p for p in found[batch, query].tolist() if p >= 0]
        assert sorted(positions) == np.flatnonzero(want[batch, query]).tolist()


def test_both_forms_of_scores_are_the_same():
    random = np.random.default_rng(0)
    query, weights, key = (
        jnp.asarray(random.normal(size=shape), jnp.float32)
        for shape in ((2, 12, 3, 8), (2, 12, 3), (2, 20, 8))
    )
    want = np.einsum(
        "bsj,bsjt->bst", weights, np.maximum(np.einsum("bsji,bti->bsjt", query, key), 0)
    )
    many = index_scores(query, weights, key)
    few = jnp.concatenate(
        [index_scores(query[:, i : i + 4], weights[:, i : i + 4], key) for i in (0, 4, 8)], axis=1
    )
    for got in (many, few):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("length, count", [(7, 1), (32, 5), (33, 33), (64, 20)])
def test_exactly_as_many_are_selected_as_top_k_does(length, count):
    """Ties, zeros, and infinities of the mask among them; the first of equal scores are taken."""
    random = np.random.default_rng(length)
    scores = random.normal(size=(3, 4, length)).astype(np.float32).round(1)
    scores[random.random(scores.shape) < 0.3] = 0
    scores[:2, :2, length // 2 :] = -np.inf
    got = np.asarray(jax.jit(among_the_largest, static_argnums=1)(jnp.asarray(scores), count))
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    want = np.zeros(scores.shape, bool)
    np.put_along_axis(want, order, True, -1)
    np.testing.assert_array_equal(got, want)


def test_equal_scores_fill_the_choice_with_positions_that_the_query_sees():
    """With one head most scores are 0, as ReLU leaves them: before, at and after the query."""
    length, count = 24, 7
    random = np.random.default_rng(0)
    scores = np.maximum(random.integers(-9, 3, (2, length, length)), -1).astype(np.float32)
    seen = np.tri(length, dtype=bool)
    masked = jnp.where(seen, jnp.asarray(scores), -jnp.inf)
    among = np.asarray(jax.jit(among_the_largest, static_argnums=1)(masked, count)) & seen
    np.testing.assert_array_equal(
        among.sum(-1), np.broadcast_to(np.minimum(np.arange(length) + 1, count), (2, length))
    )
    positions = jnp.broadcast_to(jnp.arange(length), (2, length))
    chosen = np.asarray(chosen_positions(jnp.asarray(scores), positions, count))
    for batch, query in np.ndindex(2, length):
        own = chosen[batch, query][chosen[batch, query] <= query]
        assert sorted(own.tolist()) == np.flatnonzero(among[batch, query]).tolist()


def test_no_position_after_the_query_is_chosen_before_those_that_it_sees():
    scores = jnp.asarray([[[3.0, 1.0, 2.0, 9.0], [3.0, 1.0, 2.0, 9.0]]])
    chosen = chosen_positions(scores, jnp.array([[1, 3]]), 3)
    assert set(chosen[0, 0, :2].tolist()) == {0, 1}
    assert chosen[0, 1].tolist() == [3, 0, 2]
