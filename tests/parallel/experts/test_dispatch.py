"""Dispatch and combine: every copy of a token reaches its expert, for any routing and layout."""

import functools
import math

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
from deepseek_jax.model.router import select_experts, visits
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.experts import dispatch, permutation
from deepseek_jax.parallel.experts.dispatch import AllToAllDispatch
from deepseek_jax.parallel.experts.exchange import Exchange
from deepseek_jax.parallel.experts.overflow import Rounds
from deepseek_jax.parallel.experts.reference import ReferenceDispatch
from deepseek_jax.parallel.experts.traffic import message_bytes
from deepseek_jax.precision.grouped import grouped_matmul
from deepseek_jax.precision.linear_input import numbers
from deepseek_jax.precision.payload import FP8_PAYLOAD, UNCHANGED_PAYLOAD

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 64, 8, 6, 16, 3
LAYOUTS = [
    {"node": 1, "gpu": 1},
    {"node": 1, "gpu": 8},
    {"node": 8, "gpu": 1},
    {"node": 2, "gpu": 4},
    {"node": 4, "gpu": 2},
    {"replica": 2, "node": 2, "gpu": 2},
]


def hops(two, buffer, payload=UNCHANGED_PAYLOAD):
    return AllToAllDispatch(
        separate_gpu_hop=two, capacity_factor=buffer, most_nodes=2, payload=payload
    )


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


def through(way, work, weights, tokens, gates, chosen):
    """Dispatch, experts and combine, with the overflow rounds."""
    every_choice = jnp.ones_like(chosen, dtype=jnp.bool_)
    exchange = Exchange(tokens, gates, chosen, every_choice, EXPERTS, weights)
    rounds = Rounds(way, work)
    first, served = rounds.one(exchange)
    return rounds.rest(exchange.after(served), first)


# Payloads that say where they have been: nothing may be lost, doubled or mixed up.


def stamped(_, arrived):
    """Each row times its weight, and the weight under the expert where it was."""
    rows, sizes = arrived.rows, arrived.sizes
    number = jnp.arange(rows.shape[0], dtype=sizes.dtype)
    local = jnp.searchsorted(jnp.cumsum(sizes), number, side="right")
    expert = axes.index("experts") * sizes.shape[0] + local
    stamp = jax.nn.one_hot(expert, EXPERTS, dtype=rows.dtype)
    out = jnp.concatenate([rows[:, :WIDTH], stamp], axis=1) * arrived.weights[:, None]
    return jnp.where((number < sizes.sum())[:, None], out, 1e9)  # no row of another expert


@functools.cache
def ways(sizes, two, buffer):
    """tokens MD, experts MK, weights MK -> M(D+E), and the rounds of each device."""
    layout = small.layout_of(dict(sizes))
    way = hops(two, buffer)

    def send(tokens, experts, weights):
        wide = jnp.pad(tokens, ((0, 0), (0, EXPERTS)))
        out, number = through(way, stamped, (), wide, weights, experts)
        return out, number[None]

    batch = P(layout.mesh_axes("batch") or None)
    return mapped(send, layout, (batch,) * 3, (batch, batch))


def assert_every_copy_arrives_once(sizes, experts, two, buffer):
    tokens = integers(TOKENS, WIDTH, seed=1)
    weights = np.abs(integers(*experts.shape, seed=2)) + 1
    way = ways(tuple(sizes.items()), two, buffer)
    out, number = way(tokens, experts.astype(np.int32), weights)
    np.testing.assert_array_equal(out[:, :WIDTH], tokens * weights.sum(1, keepdims=True))
    visited = np.zeros((TOKENS, EXPERTS), np.float32)
    np.put_along_axis(visited, experts, weights, axis=1)
    np.testing.assert_array_equal(out[:, WIDTH:], visited)
    return number


@pytest.mark.parametrize("two", [True, False], ids=["two_hop", "flat"])
@pytest.mark.parametrize("buffer", [0.4, 1.25, math.inf])
def test_nothing_is_dropped_or_mixed_up(two, buffer):
    for name, experts in routings(TOP_K).items():
        number = assert_every_copy_arrives_once({"node": 2, "gpu": 4}, experts, two, buffer)
        assert (number == number[0]).all()  # the same on the whole expert group
        most = {0.4: 100, 1.25: 8, math.inf: 1}[buffer]
        assert 1 <= number[0] <= most, (name, number)
        if buffer == 0.4:
            assert number[0] >= 3  # each buffer holds at most 0.4 of the load


@pytest.mark.parametrize("top_k", [1, 4])
def test_fewer_and_more_choices_than_a_device_has_experts(top_k):
    for experts in routings(top_k).values():
        assert_every_copy_arrives_once({"node": 2, "gpu": 4}, experts, True, 1.25)


def test_expert_groups_take_as_many_rounds_as_each_needs():
    experts = routings(TOP_K)["first half to the last device"]
    sizes = {"replica": 2, "node": 2, "gpu": 2}
    number = assert_every_copy_arrives_once(sizes, experts, True, 1.5)
    assert set(number[:4]) == {number[0]} and set(number[4:]) == {number[4]}
    assert number[0] > number[4] == 1


# Experts that are small networks, with all gradients.


def network(weights, arrived):
    up, down = weights
    rows = numbers(arrived.rows)
    hidden = jnp.tanh(grouped_matmul(rows, up, arrived.sizes, likely=arrived.likely))
    out = grouped_matmul(hidden, down, arrived.sizes, likely=arrived.likely)
    return out * arrived.weights[:, None]


def with_gradients(way):
    def fn(up, down, experts, tokens, weights, pull):
        def total(up, down, tokens, weights):
            out, _ = through(way, network, (up, down), tokens, weights, experts)
            return jnp.sum(out * pull), out

        grad = jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)
        (_, out), (d_up, d_down, d_tokens, d_weights) = grad(up, down, tokens, weights)
        layout = axes.current()
        if replicas := layout.summed(("experts",)) if layout else ():
            d_up, d_down = jax.lax.psum((d_up, d_down), replicas)
        return {"d_up": d_up, "d_down": d_down}, {"out": out, "d_x": d_tokens, "d_w": d_weights}

    return fn


@functools.cache
def truth(payload):
    return jax.jit(with_gradients(ReferenceDispatch(payload)))


def assert_reference(way, sizes, payload=UNCHANGED_PAYLOAD, cases=None):
    up, down = normal(EXPERTS, WIDTH, HIDDEN, seed=0), normal(EXPERTS, HIDDEN, WIDTH, seed=1)
    tokens, pull = normal(TOKENS, WIDTH, seed=2), normal(TOKENS, WIDTH, seed=3)
    weights = np.abs(normal(TOKENS, TOP_K, seed=4))
    layout = small.layout_of(sizes)
    batch, own = (P(layout.mesh_axes(axis) or None) for axis in ("batch", "experts"))
    in_specs = (own, own, batch, batch, batch, batch)
    run = mapped(with_gradients(way), layout, in_specs, (own, batch))
    for experts in routings(TOP_K).values():
        arguments = up, down, experts.astype(np.int32), tokens, weights, pull
        small.assert_close(run(*arguments), truth(payload)(*arguments))


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_two_hops_are_the_reference(sizes):
    assert_reference(hops(True, 0.75), sizes)


@pytest.mark.parametrize("sizes", [LAYOUTS[1], LAYOUTS[3], LAYOUTS[5]], ids=str)
def test_flat_is_the_reference(sizes):
    assert_reference(hops(False, 1.25), sizes)


def test_buffers_for_anything_need_no_loop():
    layout = small.layout_of({"node": 2, "gpu": 4})
    with axes.active(layout):
        assert hops(True, math.inf).complete(8, TOP_K, EXPERTS)
        assert not hops(True, 1.25).complete(8, TOP_K, EXPERTS)
    assert hops(True, 1.0).complete(8, TOP_K, EXPERTS)  # all experts here: every copy has a slot
    assert not hops(True, 0.9).complete(8, TOP_K, EXPERTS)


def test_fp8_payload_is_quantised_alike_wherever_experts_live():
    assert_reference(hops(True, 1.0, FP8_PAYLOAD), {"node": 2, "gpu": 2}, FP8_PAYLOAD)


def test_fp8_payload_rounds_tokens_out_and_gradients_in():
    """Out: the tokens' tiles. Back: the gradient of the experts' outputs, in tiles too."""
    tokens, pull = normal(TOKENS, WIDTH, seed=2), normal(TOKENS, WIDTH, seed=3)
    chosen, gates = jnp.zeros((TOKENS, 1), jnp.int32), jnp.ones((TOKENS, 1))

    def fn(tokens):
        way = hops(True, 1.0, FP8_PAYLOAD)
        return through(way, lambda _, a: 2 * numbers(a.rows), (), tokens, gates, chosen)[0]

    out, back = jax.vjp(fn, jnp.asarray(tokens))
    rounded = [
        FP8_PAYLOAD.decode(FP8_PAYLOAD.encode(jnp.asarray(x)), jnp.float32) for x in (tokens, pull)
    ]
    np.testing.assert_array_equal(out, 2 * rounded[0])
    np.testing.assert_array_equal(back(jnp.asarray(pull))[0], 2 * rounded[1])
    assert (rounded[0] != tokens).any() and (rounded[1] != pull).any()


# What crosses each hop.


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), bias=st.floats(0, 3), top_groups=st.integers(1, 4))
def test_a_token_crosses_to_at_most_its_groups_nodes_and_to_each_once(seed, bias, top_groups):
    config = small.config(
        model_experts=32, model_groups=8, model_top_groups=top_groups, model_top_k=4
    ).model
    rng = np.random.default_rng(seed)
    scores = jnp.asarray(rng.uniform(size=(1, TOKENS, 32)), jnp.float32)
    lean = jnp.asarray(bias * rng.normal(size=32), jnp.float32)
    chosen = np.asarray(select_experts(scores, lean, config)[0])
    for nodes in (8, 4):  # a group is a node; two groups are one
        distinct = [len(set(token // (32 // nodes))) for token in chosen[0]]
        assert max(distinct) <= top_groups
        assert float(visits(jnp.asarray(chosen), 32, nodes).sum()) == sum(distinct)
        there = jnp.asarray(chosen[0] // (32 // nodes))
        sent = permutation.lanes(there, nodes, TOKENS).sent
        np.testing.assert_array_equal(sent.sum(1), distinct)


def test_messages_are_as_large_as_the_formula_says():
    """V3, 4,096 tokens a GPU, 8 nodes of 8: four copies on the slow hop, eight on the fast one."""
    layout = small.layout_of({"node": 8, "gpu": 8})
    with axes.active(layout):
        plan = AllToAllDispatch(True, 1.0, 4, FP8_PAYLOAD).plan(4096, 8, 256)
    assert [hop.parts * hop.slots for hop in plan.hops] == [4 * 4096, 8 * 4096]
    assert plan.slots == plan.likely == 8 * 4096 and plan.here == 4
    slow, fast = message_bytes(plan, FP8_PAYLOAD, 7168, jnp.bfloat16, 8)["send"]
    assert slow == 4 * 4096 * (7168 + 56 + 8 * 4 + 8 * 2) and fast == 2 * slow
    assert message_bytes(plan, FP8_PAYLOAD, 7168, jnp.bfloat16, 8)["combine"][0] == 4 * 4096 * (
        14336 + 8
    )
    assert message_bytes(plan, FP8_PAYLOAD, 7168, jnp.bfloat16, 8)["combine gradient"] == [
        copies * 4096 * (7168 + 56) for copies in (4, 8)
    ]
    assert message_bytes(plan, UNCHANGED_PAYLOAD, 7168, jnp.bfloat16, 8)["send gradient"] == [
        copies * 4096 * (14336 + 8 * 4) for copies in (4, 8)
    ]


def test_reference_refuses_experts_that_are_elsewhere():
    with (
        axes.active(small.layout_of({"gpu": 2})),
        pytest.raises(ConfigError, match=r"layout\.dispatch=reference .* set it to flat"),
    ):
        every = jnp.ones((4, 2), dtype=jnp.bool_)
        ReferenceDispatch(UNCHANGED_PAYLOAD).send(
            Exchange(jnp.ones((4, 8)), jnp.ones((4, 2)), jnp.zeros((4, 2), jnp.int32), every, 4)
        )


def test_the_config_names_dispatch_and_payload():
    fp8 = dispatch.of(small.config(layout_dispatch="two_hop", precision_dispatch="fp8"))
    assert fp8 == AllToAllDispatch(
        separate_gpu_hop=True, capacity_factor=100.0, most_nodes=2, payload=FP8_PAYLOAD
    )
    flat = dispatch.of(small.config(layout_dispatch="flat", layout_capacity_factor=2.0))
    assert flat == AllToAllDispatch(
        separate_gpu_hop=False, capacity_factor=2.0, most_nodes=2, payload=UNCHANGED_PAYLOAD
    )
    assert dispatch.of(small.config(layout_dispatch="reference")) == ReferenceDispatch(
        UNCHANGED_PAYLOAD
    )
