"""Expert balancer: the published case, invariants of every placement, and evenness."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import integers

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.experts.balancer import place, slots_for

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# 2 layers, 12 experts; the placement that the authors' own code prints for them.
LOAD = np.array([
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
])  # fmt: skip
SIZES = {"slots": 16, "groups": 4, "nodes": 2, "gpus": 8}
EXPERT_OF_SLOT = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_case():
    placement = place(LOAD, **SIZES)
    np.testing.assert_array_equal(placement.expert_of_slot, EXPERT_OF_SLOT)
    np.testing.assert_array_equal(placement.copies[0], [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1])
    np.testing.assert_array_equal(placement.slots_of_expert[0, 1], [13, 15, -1, -1, -1])


@st.composite
def cases(draw):
    """Loads of three layers and sizes: groups that divide among the nodes, and groups that don't.

    Integers, and few enough of them that equal loads and zeros come up.
    """
    nodes, gpus, per_group = (draw(st.integers(1, most)) for most in (3, 4, 4))
    groups = draw(st.integers(1, 6))
    experts, gpus = groups * per_group, nodes * gpus
    slots = (-(-experts // gpus) + draw(st.integers(0, 3))) * gpus
    layer = st.lists(st.integers(0, 30), min_size=experts, max_size=experts)
    load = np.array(draw(st.lists(layer, min_size=3, max_size=3)))
    return load, {"slots": slots, "groups": groups, "nodes": nodes, "gpus": gpus}


thorough = settings(max_examples=150, deadline=None, derandomize=True)


def hierarchical(sizes):
    return sizes["groups"] % sizes["nodes"] == 0


def slot_load(load, placement):
    """LR: an expert's load is shared by its copies."""
    return np.take_along_axis(load / placement.copies, placement.expert_of_slot, axis=1)


@thorough
@given(case=cases())
def test_every_expert_has_a_slot_and_every_slot_an_expert(case):
    load, sizes = case
    placement = place(load, **sizes)
    layers, experts = load.shape
    assert placement.expert_of_slot.shape == (layers, sizes["slots"])
    assert placement.slots_of_expert.shape == (layers, experts, sizes["slots"] - experts + 1)
    for layer in range(layers):
        held = placement.expert_of_slot[layer]
        assert placement.copies[layer].min() >= 1
        for expert, slots in enumerate(placement.slots_of_expert[layer]):
            want = np.flatnonzero(held == expert)
            assert placement.copies[layer, expert] == len(want)
            np.testing.assert_array_equal(
                slots, np.pad(want, (0, len(slots) - len(want)), constant_values=-1)
            )


@thorough
@given(case=cases())
def test_a_group_stays_on_one_node_with_all_its_copies(case):
    load, sizes = case
    placement = place(load, **sizes)
    if not hierarchical(sizes):
        return
    per_node, per_group = sizes["slots"] // sizes["nodes"], load.shape[1] // sizes["groups"]
    node = np.arange(sizes["slots"]) // per_node
    for held in placement.expert_of_slot:
        pairs = {*zip(held // per_group, node, strict=True)}
        assert len(pairs) == sizes["groups"]
        per = np.bincount([n for _, n in pairs], minlength=sizes["nodes"])
        assert np.all(per == sizes["groups"] // sizes["nodes"])


@thorough
@given(case=cases())
def test_gpus_of_a_node_differ_by_one_slot_and_no_slot_has_too_much(case):
    """The two bounds that the module's docstring states."""
    load, sizes = case
    placement = place(load, **sizes)
    nodes = sizes["nodes"] if hierarchical(sizes) else 1
    per_slot = slot_load(load, placement).reshape(len(load), nodes, -1)  # LNr
    per_gpu = per_slot.reshape(len(load), nodes, sizes["gpus"] // nodes, -1).sum(-1)
    assert np.all(np.ptp(per_gpu, axis=-1) <= per_slot.max(-1) + 1e-9)
    most = (sizes["slots"] - load.shape[1]) // nodes + 1
    assert np.all(per_slot.max(-1) <= per_slot.sum(-1) / most + 1e-9)


@thorough
@given(case=cases())
def test_layers_are_placed_alone_and_always_alike(case):
    load, sizes = case
    together = place(load, **sizes)
    for layer in range(len(load)):
        alone = place(load[layer : layer + 1].copy(), **sizes)
        jax.tree.map(
            lambda all_, one, n=layer: np.testing.assert_array_equal(all_[n], one[0]),
            together,
            alone,
        )


@thorough
@given(load=st.lists(st.integers(0, 30), min_size=4, max_size=4), more=st.integers(0, 4))
def test_no_other_copies_give_a_lower_maximum(load, more):
    load = np.array([load])
    got = (load / place(load, slots=4 + more, groups=1, nodes=1, gpus=1).copies).max()
    every = itertools.product(range(1, more + 2), repeat=4)
    best = min((load[0] / c).max() for c in every if sum(c) == 4 + more)
    assert got == best


def test_one_slot_per_gpu_is_the_experts_in_order():
    placement = place(LOAD, slots=12, groups=1, nodes=1, gpus=12)
    np.testing.assert_array_equal(placement.expert_of_slot, [range(12)] * 2)


def test_published_deployment_is_evened_out():
    """256 experts on 32 GPUs of 4 nodes, 32 of them twice (section 3.4.1), of skewed popularity."""
    load = np.random.default_rng(0).lognormal(sigma=0.5, size=(58, 256))
    placement = place(load, slots=288, groups=8, nodes=4, gpus=32)
    worst = slot_load(load, placement).reshape(58, 32, 9).sum(-1).max(-1) / (load.sum(-1) / 32)
    before = load.reshape(58, 32, 8).sum(-1).max(-1) / (load.sum(-1) / 32)
    assert np.all(worst < before)
    assert np.mean(before) > 1.4 and np.mean(worst) < 1.05


def test_a_lucky_order_can_be_better():
    """Greedy packing is not optimal: nothing may rely on a placement never being worse."""
    load = np.array([[3, 3, 0, 2, 2, 2]])
    placement = place(load, slots=6, groups=1, nodes=1, gpus=2)
    np.testing.assert_array_equal(placement.expert_of_slot, [[0, 3, 5, 1, 4, 2]])  # 7 and 5, not 6


@pytest.mark.parametrize(
    "change, words",
    [
        ({"slots": 8}, "8 do not give .* 12 experts one; set slots to a multiple of 8 from 16"),
        ({"slots": 18}, "slots=18 do not give each of 8 GPUs as many"),
        ({"gpus": 9, "slots": 18}, "gpus=9 do not divide among nodes=2"),
        ({"groups": 5}, "12 experts do not divide into groups=5"),
        ({"nodes": 0}, "nodes=0 must be 1 or more"),
        ({"load": LOAD[0]}, r"load of shape \(12,\)"),
        ({"load": LOAD * np.nan}, "not a finite number"),
        ({"load": -LOAD}, "from 0 on"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input(change, words):
    with pytest.raises(ConfigError, match=words):
        place(**({"load": LOAD} | SIZES | change))


# Tokens to copies.


def one_layer(load, slots):
    placement = place(np.array([load]), slots=slots, groups=1, nodes=1, gpus=1)
    return jax.tree.map(lambda array: array[0], placement)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    load=st.lists(st.integers(0, 30), min_size=6, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    first=st.integers(0, 7),
)
def test_each_copy_gets_its_share(load, seed, first):
    placement = one_layer(load, slots=11)
    random = np.random.default_rng(seed)
    experts = np.array([random.permutation(6)[:3] for _ in range(16)], np.int32)
    slots = np.asarray(jax.jit(slots_for)(experts, placement, first))
    assert slots.dtype == np.int32
    np.testing.assert_array_equal(placement.expert_of_slot[slots], experts)
    tokens = np.bincount(slots.reshape(-1), minlength=11)
    for expert in range(6):
        share = tokens[placement.expert_of_slot == expert]
        assert np.ptp(share) <= 1 and share.sum() == np.sum(experts == expert)


def test_shares_are_even_though_the_choices_follow_the_position():
    placement = one_layer([9, 1], slots=3)
    experts = np.tile(np.array([0, 1], np.int32), 8)[:, None]
    slots = np.asarray(slots_for(experts, placement))
    np.testing.assert_array_equal(slots[::2, 0], np.tile(placement.slots_of_expert[0], 4))


def test_devices_take_turns_with_the_odd_token():
    placement = one_layer([9, 1, 1], slots=5)  # expert 0 three times
    experts = jnp.zeros((1, 1), jnp.int32)
    slots = [int(slots_for(experts, placement, device)[0, 0]) for device in range(6)]
    np.testing.assert_array_equal(np.bincount(slots)[placement.slots_of_expert[0]], [2, 2, 2])


def test_copies_of_weights_compute_what_the_experts_do():
    """Each layer in turn, as a scan over layers has them; integers, so equal to the bit."""
    placement = place(LOAD, **SIZES)
    experts = np.argsort(np.random.default_rng(0).random((2, 40, 12)), axis=-1)[..., :3].astype(
        np.int32
    )
    tokens, weights = integers(40, 5, seed=1), integers(2, 12, 5, 4, seed=2)  # MD, LEDF

    def routed(matrices, chosen):
        return jnp.einsum("MD,MKDF->MF", tokens, matrices[chosen])

    def layer(_, inputs):
        placed, chosen, matrices = inputs
        slots = slots_for(chosen, placed)
        return None, (routed(matrices, chosen), routed(matrices[placed.expert_of_slot], slots))

    _, (want, got) = jax.lax.scan(layer, None, (placement, experts, weights))
    np.testing.assert_array_equal(got, want)
    assert np.any(got)
