"""Permute and unpermute against plain loops, for any choice, also with too few slots."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import integers

from deepseek_jax.parallel.experts import permutation

pytestmark = pytest.mark.usefixtures("strict_dtypes")

ROWS, PLACES = 12, 5  # and few numbers of slots, since each compiles anew
choices = st.lists(
    st.lists(st.integers(-1, PLACES), min_size=3, max_size=3), min_size=ROWS, max_size=ROWS
)


def copies(places):
    """(row, place) of each copy, by place and then by row."""
    found = {(row, p) for row, own in enumerate(places) for p in own if 0 <= p < PLACES}
    return sorted(found, key=lambda copy: (copy[1], copy[0]))


def by_hand(places, slot_of, slots):
    """Slot -> row, and row -> its slots, of the copies that have one."""
    row_of, slots_of = {}, {row: [] for row in range(ROWS)}
    for row, place in copies(places):
        if (slot := slot_of(row, place)) is not None and slot < slots:
            row_of[slot] = row
            slots_of[row].append(slot)
    return row_of, slots_of


def assert_moves_like(made, row_of, slots_of, slots):
    x, y = integers(ROWS, 2, seed=0), integers(slots, 2, seed=1)
    want = np.zeros((slots, 2), np.float32)
    for slot, row in row_of.items():
        want[slot] = x[row]
    np.testing.assert_array_equal(made.permute(jnp.asarray(x)), want)
    want = np.stack([y[slots_of[row]].sum(0) if slots_of[row] else 0 * y[0] for row in slots_of])
    np.testing.assert_array_equal(made.unpermute(jnp.asarray(y)), want)


def assert_choices_like(made, places, slot_of, slots):
    """A number of each choice goes to the slot that serves it and back, when no copy is shared."""
    numbers = np.arange(1, ROWS * 3 + 1, dtype=np.float32).reshape(ROWS, 3)
    there = np.asarray(made.permute_choices(jnp.asarray(numbers)))
    back = np.asarray(made.unpermute_choices(jnp.asarray(there)))
    for row, own in enumerate(places):
        for k, place in enumerate(own):
            slot = slot_of(row, place) if 0 <= place < PLACES else None
            served = slot is not None and slot < slots
            assert bool(made.choice_sent[row, k]) == served
            if served and own.count(place) == 1:
                assert there[slot] == back[row, k] == numbers[row, k]
            assert served or back[row, k] == 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(places=choices, slots=st.sampled_from([1, 3, 6, ROWS]))
def test_lanes(places, slots):
    order = {}
    for row, place in copies(places):
        order[row, place] = sum(p == place for _, p in order)

    def slot_of(row, place):
        rank = order[row, place]
        return place * slots + rank if rank < slots else None

    made = permutation.lanes(jnp.asarray(places, jnp.int32), PLACES, slots)
    assert_moves_like(made, *by_hand(places, slot_of, PLACES * slots), PLACES * slots)
    assert_choices_like(made, places, slot_of, PLACES * slots)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(places=choices, slots=st.sampled_from([1, 5, ROWS, 2 * ROWS]))
def test_sorted_by_place(places, slots):
    order = {copy: number for number, copy in enumerate(copies(places))}

    def slot_of(row, place):
        return order[row, place]

    made, sizes = permutation.sorted_by_expert(jnp.asarray(places, jnp.int32), PLACES, slots)
    assert_moves_like(made, *by_hand(places, slot_of, slots), slots)
    assert_choices_like(made, places, slot_of, slots)
    got = [sum(p == place for _, p in copies(places)[:slots]) for place in range(PLACES)]
    np.testing.assert_array_equal(sizes, got)


@pytest.mark.parametrize("places", [2, 7], ids=["fewer places than choices", "more places"])
def test_copies_of_one_place_are_one(places):
    """Both ways of listing a row's copies: by place, and by first choice."""
    chosen = jnp.asarray([[1, 1, 0], [0, 0, 0], [1, 0, 1]], jnp.int32)
    made = permutation.lanes(chosen, places, 3)
    np.testing.assert_array_equal(made.sent.sum(1), [2, 1, 2])
    assert made.slot.shape[1] == min(places, 3)
    ones = made.permute(jnp.ones((3, 1)))
    assert float(ones.sum()) == 5
    np.testing.assert_array_equal(made.unpermute(ones)[:, 0], [2, 1, 2])


def test_sums_of_bfloat16_are_float32():
    made = permutation.lanes(jnp.asarray([[0, 1]], jnp.int32), 2, 1)
    total = made.unpermute(jnp.asarray([[256.0], [1.0]], jnp.bfloat16))
    assert total.dtype == jnp.float32 and float(total[0, 0]) == 257.0
