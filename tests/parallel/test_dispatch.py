"""Every token's copies reach their experts and come home: exactly, for any routing and layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from pieces import integers, mapped

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel import axes, dispatch
from deepseek_jax.precision.grouped import grouped_matmul

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TOKENS, WIDTH, HIDDEN, EXPERTS = 64, 8, 6, 16
LAYOUTS = [
    {"node": 1, "gpu": 1},
    {"node": 1, "gpu": 2},
    {"node": 2, "gpu": 2},
    {"node": 1, "gpu": 8},
    {"node": 8, "gpu": 1},
    {"node": 2, "gpu": 4},
    {"replica": 2, "node": 2, "gpu": 2},
]


def normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def routings(top_k):
    """Distinct experts per token, MK: at random, and as uneven as can be."""
    rng = np.random.default_rng(0)
    first, last = np.arange(top_k), np.arange(EXPERTS - top_k, EXPERTS)
    any_expert = np.array([rng.permutation(EXPERTS)[:top_k] for _ in range(TOKENS)])
    return {
        "random": any_expert,
        "all to the first device": np.tile(first, (TOKENS, 1)),
        "all to the last device": np.tile(last[::-1], (TOKENS, 1)),
        "first half to the last device": np.where(
            np.arange(TOKENS)[:, None] < TOKENS // 2, last, any_expert
        ),
    }


# Payloads that say where they have been: nothing may be lost, doubled or mixed up.


@functools.cache
def ways(sizes):
    """tokens MD, experts MK, weights MK -> M(D+E) and rows per expert E."""
    layout = small.layout_of(dict(sizes))

    def send(tokens, experts, weights):
        counts = []

        def run(rows, row_weights, sizes, likely):
            """Each row times its weight, and the weight under the expert where it was."""
            counts.append(sizes)
            number = jnp.arange(rows.shape[0], dtype=sizes.dtype)
            local = jnp.searchsorted(jnp.cumsum(sizes), number, side="right")
            expert = axes.index("experts") * sizes.shape[0] + local
            stamp = jax.nn.one_hot(expert, EXPERTS, dtype=rows.dtype)
            out = jnp.concatenate([rows, stamp], axis=1) * row_weights[:, None]
            return jnp.where((number < sizes.sum())[:, None], out, 1e9)  # nobody's rows stay here

        out = dispatch.flat(run, tokens, experts, weights, EXPERTS)
        (arrived,) = counts
        if replicas := layout.summed(("experts",)):
            arrived = jax.lax.psum(arrived, replicas)
        return out, arrived

    tokens, own = (P(layout.mesh_axes(axis) or None) for axis in ("batch", "experts"))
    return mapped(send, layout, (tokens,) * 3, (tokens, own))


def every_copy_arrives_once(sizes, experts):
    tokens = integers(TOKENS, WIDTH, seed=1)
    weights = np.abs(integers(*experts.shape, seed=2)) + 1
    out, arrived = ways(tuple(sizes.items()))(tokens, experts.astype(np.int32), weights)
    np.testing.assert_array_equal(out[:, :WIDTH], tokens * weights.sum(1, keepdims=True))
    visited = np.zeros((TOKENS, EXPERTS), np.float32)
    np.put_along_axis(visited, experts, weights, axis=1)
    np.testing.assert_array_equal(out[:, WIDTH:], visited)
    np.testing.assert_array_equal(arrived, np.bincount(experts.reshape(-1), minlength=EXPERTS))


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_nothing_is_dropped_or_mixed_up(sizes):
    for experts in routings(top_k=2).values():
        every_copy_arrives_once(sizes, experts)


@pytest.mark.parametrize("top_k", [1, 4])
def test_fewer_and_more_choices_than_a_device_has_experts(top_k):
    for experts in routings(top_k).values():
        every_copy_arrives_once({"node": 2, "gpu": 4}, experts)


# Experts that are small networks, with all gradients.


def with_gradients(through):
    def fn(up, down, experts, tokens, weights, pull):
        def total(up, down, tokens, weights):
            def run(rows, row_weights, sizes, likely):
                hidden = jnp.tanh(grouped_matmul(rows, up, sizes, likely=likely))
                out = grouped_matmul(hidden, down, sizes, likely=likely)
                return out * row_weights[:, None]

            out = through(run, tokens, experts, weights, EXPERTS)
            return jnp.sum(out * pull), out

        grad = jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)
        (_, out), (d_up, d_down, d_tokens, d_weights) = grad(up, down, tokens, weights)
        layout = axes.current()
        if replicas := layout.summed(("experts",)) if layout else ():
            d_up, d_down = jax.lax.psum((d_up, d_down), replicas)
        return {"d_up": d_up, "d_down": d_down}, {"out": out, "d_x": d_tokens, "d_w": d_weights}

    return fn


@functools.cache
def truth():
    return jax.jit(with_gradients(dispatch.reference))


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_flat_is_the_reference(sizes):
    up, down = normal(EXPERTS, WIDTH, HIDDEN, seed=0), normal(EXPERTS, HIDDEN, WIDTH, seed=1)
    tokens, pull = normal(TOKENS, WIDTH, seed=2), normal(TOKENS, WIDTH, seed=3)
    weights = np.abs(normal(TOKENS, 2, seed=4))
    layout = small.layout_of(sizes)
    batch, own = (P(layout.mesh_axes(axis) or None) for axis in ("batch", "experts"))
    in_specs = (own, own, batch, batch, batch, batch)
    flat = mapped(with_gradients(dispatch.flat), layout, in_specs, (own, batch))
    for experts in routings(top_k=2).values():
        arguments = up, down, experts.astype(np.int32), tokens, weights, pull
        small.close(flat(*arguments), truth()(*arguments))


# The parts that move rows, against plain indexing.


def same_as(moves, plain, x):
    """Values and gradients of two functions of x, to the bit."""
    out, back = jax.vjp(moves, jnp.asarray(x))
    plain_out, plain_back = jax.vjp(plain, jnp.asarray(x))
    np.testing.assert_array_equal(out, plain_out)
    pull = jnp.asarray(integers(*out.shape, seed=9))
    np.testing.assert_array_equal(back(pull)[0], plain_back(pull)[0])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(keys=st.lists(st.integers(0, 4), min_size=24, max_size=24), matrix=st.booleans())
def test_permute_is_indexing_and_undone(keys, matrix):
    keys = np.array(keys, np.int32)
    order = dispatch.sort_by(jnp.asarray(keys), 6)
    np.testing.assert_array_equal(order.index, np.argsort(keys, kind="stable"))
    np.testing.assert_array_equal(order.sizes, np.bincount(keys, minlength=6))
    x = integers(24, 3, seed=0) if matrix else integers(24, seed=0)
    there = dispatch.permute(jnp.asarray(x), order)
    np.testing.assert_array_equal(dispatch.permute(there, order.inverse()), x)
    same_as(lambda x: dispatch.permute(x, order), lambda x: x[order.index], x)
    back = order.inverse()
    same_as(lambda x: dispatch.permute(x, back), lambda x: x[jnp.argsort(order.index)], x)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(keys=st.lists(st.integers(0, 4), min_size=24, max_size=24))
def test_take_copies_is_indexing(keys):
    order = dispatch.sort_by(jnp.asarray(keys, jnp.int32), 5)
    same_as(
        lambda x: dispatch.take_copies(x, order, 3),
        lambda x: jnp.repeat(x, 3, axis=0)[order.index],
        integers(8, 5, seed=0),
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 12), min_size=3, max_size=3), matrix=st.booleans())
def test_lanes_are_indexing_and_undone(cuts, matrix):
    sizes = np.diff([0, *sorted(cuts), 12]).astype(np.int32)
    lanes = dispatch.Lanes.of(jnp.asarray(sizes), 12, 12)
    x = integers(12, 3, seed=0) if matrix else integers(12, seed=0)
    lane = np.repeat(np.arange(4), sizes)  # of each row
    place = np.concatenate([np.arange(size) for size in sizes])
    same_as(lanes.fill, lambda x: jnp.zeros((4, 12, *x.shape[1:])).at[lane, place].set(x), x)
    np.testing.assert_array_equal(lanes.empty(lanes.fill(jnp.asarray(x))), x)
    garbage = integers(4, 12, *x.shape[1:], seed=1)  # in slots that no row has, too
    same_as(lanes.empty, lambda x: x[lane, place], garbage)


def test_reference_refuses_experts_that_are_elsewhere():
    with (
        axes.active(small.layout_of({"gpu": 2})),
        pytest.raises(ConfigError, match=r"layout\.dispatch=reference .* use flat"),
    ):
        dispatch.reference(None, jnp.ones((4, 8)), jnp.zeros((4, 2), int), jnp.ones((4, 2)), 4)


def test_by_name():
    assert dispatch.by_name("flat") is dispatch.flat is dispatch.FLAT
    assert dispatch.by_name("reference") is dispatch.reference
    with pytest.raises(ConfigError, match=r"layout\.dispatch is 'deepep'; known: flat, reference"):
        dispatch.by_name("deepep")
