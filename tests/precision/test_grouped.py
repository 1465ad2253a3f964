"""Grouped matmul against one masked einsum: every count of rows per expert, forward and backward.

All numbers are small integers, whose float32 sums are exact in any order: results are compared
exactly, and bfloat16 results are those of float32 after one rounding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek_jax.precision import grouped

pytestmark = pytest.mark.usefixtures("strict_dtypes")

ROWS, WIDE, NARROW, EXPERTS = 300, 8, 12, 4
ONE, FEW, SOME, WHOLE = 1, 20, 96, 2 * ROWS  # values of `likely`
PATHS = [(likely, "float32") for likely in (FEW, SOME, WHOLE)]
PATHS += [(SOME, "bfloat16")]


def integers(*shape, seed):
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


X = integers(ROWS, WIDE, seed=0)
WEIGHT = integers(EXPERTS, WIDE, NARROW, seed=1)
PULL = integers(ROWS, NARROW, seed=2)

# Cuts of the rows into experts; rows behind the last cut belong to no expert.
sizes_of_all = st.lists(st.integers(0, ROWS), min_size=EXPERTS, max_size=EXPERTS).map(
    lambda cuts: [int(n) for n in np.diff([0, *sorted(cuts)])]
)
CORNERS = [
    [0, 0, 0, 0],
    [ROWS, 0, 0, 0],
    [0, 0, 0, ROWS],
    [75, 75, 75, 75],
    [32, 0, 32, 33],  # one row beyond a block
    [1, 0, 299, 0],
    [0, 128, 1, 129],
]


def with_corners(test):
    return functools.reduce(lambda test, sizes: example(sizes=sizes)(test), CORNERS, test)


def with_gradients(fn):
    def run(x, weight, sizes, pull):
        out, back = jax.vjp(lambda x, weight: fn(x, weight, sizes), x, weight)
        return out, *back(pull)

    return jax.jit(run)


@functools.cache
def compiled(likely, dtype):
    fn = with_gradients(functools.partial(grouped.grouped_matmul, likely=likely))
    cast = [jnp.asarray(part, dtype) for part in (WEIGHT, PULL)]
    return lambda x, sizes: fn(jnp.asarray(x, dtype), cast[0], jnp.asarray(sizes), cast[1])


@functools.cache
def truth():
    return with_gradients(grouped.reference)


@functools.cache
def blocks(block):
    return jax.jit(lambda sizes: grouped._blocks(sizes, block, ROWS))


@pytest.mark.parametrize("likely, dtype", PATHS)
@settings(max_examples=15, deadline=None, derandomize=True)
@with_corners
@given(sizes=sizes_of_all)
def test_any_sizes_give_the_masked_einsum(likely, dtype, sizes):
    used, sizes = sum(sizes), np.array(sizes, np.int32)
    with_garbage = X.copy()
    with_garbage[used:] = np.nan  # rows of no expert are never read
    got = compiled(likely, dtype)(with_garbage, sizes)
    for part, want in zip(got, truth()(X, WEIGHT, sizes, PULL), strict=True):
        assert part.dtype == dtype
        np.testing.assert_array_equal(part, want.astype(dtype))
    out, d_rows, _ = got
    assert not np.any(out[used:]) and not np.any(d_rows[used:])


@pytest.mark.parametrize("block", [1, 32, 128])
@settings(max_examples=40, deadline=None, derandomize=True)
@with_corners
@given(sizes=sizes_of_all)
def test_blocks_cover_every_row_once(block, sizes):
    count, *found = (np.asarray(part) for part in blocks(block)(np.array(sizes, np.int32)))
    assert count <= len(found[0])
    walked = [
        (row, expert)
        for expert, first, end in zip(*(part[:count] for part in found), strict=True)
        for row in range(first, min(first + block, end))
    ]
    experts = np.repeat(np.arange(EXPERTS), sizes)
    assert walked == list(enumerate(experts))


@pytest.mark.parametrize(
    "likely, block",
    [(0, 1), (ONE, 1), (FEW, 8), (SOME, 28), (WHOLE, 88), (ROWS, 88), (4 * 320, 180)],
)
def test_likely_sets_the_block(monkeypatch, likely, block):
    """A little over the even number of rows, in fours, or a part of it; one for a row or less."""
    seen = []
    monkeypatch.setattr(grouped, "_grouped", lambda *arguments: seen.append(arguments[3]))
    rows = np.zeros((max(ROWS, likely), WIDE), np.float32)
    given = rows[:ROWS] if likely <= WHOLE else rows
    grouped.grouped_matmul(given, WEIGHT, np.zeros(EXPERTS, np.int32), likely=likely)
    assert seen[0].block == block


@pytest.mark.parametrize(
    "block, sizes, count",
    [
        (28, [24, 24, 24, 24], 4),  # balanced: a block per expert
        (28, [28, 28, 28, 28], 4),
        (28, [29, 28, 28, 28], 5),
        (28, [0, 284, 0, 0], 11),
        (28, [0, 0, 0, 0], 0),
    ],
)
def test_only_what_is_there_is_walked(block, sizes, count):
    assert blocks(block)(np.array(sizes, np.int32))[0] == count


@pytest.mark.parametrize("rows", [1, 3, 7, 9])
def test_fewer_rows_than_a_block(rows):
    sizes = np.array([rows // 2, 0, rows - rows // 2, 0], np.int32)
    fn = with_gradients(functools.partial(grouped.grouped_matmul, likely=rows))
    got = fn(X[:rows], WEIGHT, sizes, PULL[:rows])
    want = with_gradients(grouped.reference)(X[:rows], WEIGHT, sizes, PULL[:rows])
    for part, wanted in zip(got, want, strict=True):
        np.testing.assert_array_equal(part, wanted)


def test_a_mesh_of_cpus_traces_no_kernel():
    def kernel(x):
        raise AssertionError("traced for a CPU")

    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices("cpu")[:2])
    chosen = jax.jit(lambda x: grouped.by_platform(lambda x: x + 1, kernel)(x))
    with jax.set_mesh(mesh):
        assert chosen(jnp.float32(1)) == 2
    with pytest.raises(AssertionError, match="traced for a CPU"):  # the target is not known
        chosen(jnp.float32(1))
