"""Interleaved works: in order, each to its end, with an optimization barrier between turns."""

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.parallel.overlap import (
    beside,
    interleave,
    run_to_end,
    side_by_side,
    storing,
)


def work(name, steps, seen):
    value = jnp.ones(())
    for number in range(steps):
        seen.append(f"{name}{number}")
        value = yield value + 1
    seen.append(f"{name}.")
    return value


def test_steps_come_in_the_order_of_the_turns():
    seen = []
    interleave({"a": work("a", 3, seen), "b": work("b", 2, seen)}, ["a", "ba", "a", "b"])
    assert seen == ["a0", "b0", "a1", "a2", "a.", "b1", "b."]


def test_what_is_alone_goes_straight():
    seen = []
    assert run_to_end(work("a", 3, seen)) == 4 and seen[-1] == "a."
    assert run_to_end(work("a", 0, [])) == 1


def test_a_fence_for_each_turn_of_several():
    def both(turns):
        return lambda: interleave({"a": work("a", 3, []), "b": work("b", 2, [])}, turns)

    assert str(jax.make_jaxpr(both(["ab", "ab", "a"]))()).count("optimization_barrier") == 2
    assert str(jax.make_jaxpr(both(["a", "a", "a", "b", "b"]))()).count("optimization_barrier") == 0


@pytest.mark.parametrize("turns", [["a"], ["a", "a", "a", "a"]])
def test_turns_that_do_not_fit_a_work(turns):
    with pytest.raises((ValueError, StopIteration)):
        interleave({"a": work("a", 2, [])}, turns)


@pytest.mark.parametrize(
    "some, others, want",
    [
        ("aa", "bb", ["ab", "ab"]),
        ("a", "bb", ["abb"]),
        ("aaa", "bb", ["ab", "aab"]),
        ("", "bb", ["bb"]),
        ("aa", "", ["aa"]),
    ],
)
def test_steps_side_by_side(some, others, want):
    assert side_by_side(some, others) == want


def test_a_step_ends_with_what_stands_beside_it():
    def program(x):
        out = {}
        hops = storing(out, "hops", beside(work("a", 2, []), 2, x * 3))
        interleave({"a": hops, "b": work("b", 2, [])}, ["a", "ab", "b"])
        return out["hops"]

    assert program(jnp.float32(5)) == (3, 15)
    # The barrier after the second turn holds the step's value, what is beside it, and the other's.
    (fence,) = [
        equation
        for equation in jax.make_jaxpr(program)(1.0).eqns
        if equation.primitive.name == "optimization_barrier"
    ]
    assert len(fence.invars) == 3
    assert run_to_end(beside(work("a", 0, []), 1, 7)) == (1, 7)
