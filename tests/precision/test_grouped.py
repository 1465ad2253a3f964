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
LOOP_ONLY, FEW, SMALL_SHARE, WHOLE = 1, 20, 96, 2 * ROWS  # values of `likely`
PATHS = [(likely, "float32") for likely in (FEW, SMALL_SHARE, WHOLE)]
PATHS += [(SMALL_SHARE, "bfloat16")]


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
    [32, 0, 32, 33],  # one row beyond a share
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
def blocks(share):
    block = grouped.BLOCK_ROWS
    return jax.jit(lambda sizes: grouped._overflow_blocks(sizes, share, block, ROWS)), block


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


@pytest.mark.parametrize("share", [0, 32, 88])
@settings(max_examples=40, deadline=None, derandomize=True)
@with_corners
@given(sizes=sizes_of_all)
def test_blocks_cover_what_is_beyond_the_shares_once(share, sizes):
    find, block = blocks(share)
    count, experts, starts = (np.asarray(part) for part in find(np.array(sizes, np.int32)))
    assert count <= len(experts)
    ends = np.cumsum(sizes)
    walked = [
        (row, expert)
        for expert, start in zip(experts[:count], starts[:count], strict=True)
        for row in range(start, min(start + block, ends[expert]))
    ]
    beyond = [
        (row, expert)
        for expert, (end, size) in enumerate(zip(ends, sizes, strict=True))
        for row in range(end - size + share, end)
    ]
    assert walked == beyond


@pytest.mark.parametrize(
    "likely, share, block",
    [
        (0, 0, 1),
        (LOOP_ONLY, 0, 1),
        (FEW, 8, 8),
        (SMALL_SHARE, 32, 128),
        (WHOLE, 88, 128),
        (ROWS, 88, 128),
    ],
)
def test_likely_sets_the_share(monkeypatch, likely, share, block):
    """A little over the even share, in eights; below FEW_ROWS in fours; none for a row or less."""
    seen = []
    monkeypatch.setattr(grouped, "_grouped", lambda *arguments: seen.append(arguments[3]))
    grouped.grouped_matmul(X, WEIGHT, np.zeros(EXPERTS, np.int32), likely=likely)
    (plan,) = seen
    assert (plan.share, plan.block) == (share, block)


@pytest.mark.parametrize(
    "share, sizes, count",
    [
        (0, [24, 24, 24, 24], 4),  # no share: a block per expert
        (32, [24, 24, 24, 24], 0),  # balanced: no loop
        (32, [32, 32, 32, 32], 0),
        (32, [33, 32, 32, 32], 1),
        (32, [0, ROWS, 0, 0], 3),  # 268 rows in blocks of 128
        (88, [75, 75, 75, 75], 0),
        (32, [0, 0, 0, 0], 0),
    ],
)
def test_only_what_is_there_is_walked(share, sizes, count):
    find, _ = blocks(share)
    assert find(np.array(sizes, np.int32))[0] == count


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
