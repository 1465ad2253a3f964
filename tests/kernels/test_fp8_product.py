"""The FP8 product kernel in JAX's interpreter, exactly, for every tiling and any sizes."""

import dataclasses
import functools

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scaled

from deepseek_jax.kernels import fp8_product, matmul_tiling, row_blocks
from deepseek_jax.kernels.matmul_tiling import PRODUCT_TILINGS, SQUARE, TALL, WIDE

pytestmark = pytest.mark.usefixtures("strict_dtypes")

M, N, K, E = 256, 256, 256, 3
# Rows of each expert. Those after the last are nobody's.
SIZES = [
    (130, 0, 70),
    (1, 254, 1),
    (0, 0, 0),
    (256, 0, 0),
    (0, 0, 256),
    (128, 0, 128),
    (0, 5, 0),
]


@functools.cache
def kernel(tiling, sms, grouped):
    """Two stages, so that the ring turns."""
    tiling = dataclasses.replace(tiling, stages=2, band=1)

    def run(x, x_scales, weights, weight_scales, sizes):
        return fp8_product.product(
            x, x_scales, weights, weight_scales, sizes if grouped else None,
            tiling=tiling, sms=sms, dtype=jnp.float32, interpret=interpreted.GPU,
        )  # fmt: skip

    return jax.jit(run)


def operands(columns, experts):
    return (
        scaled.values(M, K, seed=0),
        scaled.scales(K // 128, M, seed=1),
        scaled.values(experts, columns, K, seed=2),
        scaled.scales(experts, columns // 128, K // 128, seed=3),
    )


def by_loop(x, x_scales, weights, weight_scales, sizes):
    rows, weights = scaled.whole(x, x_scales.T), scaled.whole(weights, weight_scales)
    out, first = np.zeros((len(rows), weights.shape[1])), 0
    for size, weight in zip(sizes, weights, strict=True):
        out[first : first + size] = rows[first : first + size] @ weight.T
        first += size
    return out


slow = pytest.mark.slow  # the interpreter compiles every simulated warpgroup, in each run


@pytest.mark.parametrize(
    "tiling", [t if t == WIDE or t.pair else pytest.param(t, marks=slow) for t in PRODUCT_TILINGS],
    ids=str,
)  # fmt: skip
def test_products_are_exact(tiling):
    """One thread block, or pair, for two tiles or four."""
    if tiling.pair and not interpreted.PAIRS:
        pytest.skip("the interpreter of this jax has no clusters")
    given = operands(2 * tiling.width if tiling.pair else N, 1)
    got = interpreted.run(kernel(tiling, tiling.cluster, False), *given, None)
    np.testing.assert_array_equal(got, by_loop(*given, [M]))


@pytest.mark.parametrize(
    ("tiling", "sms", "sizes"),
    [
        (SQUARE, 1, SIZES[0]),
        (TALL, 1, SIZES[1]),
        *(pytest.param(t, 2, sizes, marks=slow) for t in (SQUARE, TALL) for sizes in SIZES),
    ],
    ids=str,
)  # fmt: skip
def test_rows_of_several_experts(tiling, sms, sizes):
    """Experts that begin and end inside a block of rows, or have none; rows of nobody are NaN."""
    x, x_scales, *rest = operands(128, E)
    nobodys = np.arange(M) >= sum(sizes)
    given = (
        jnp.where(nobodys[:, None], jnp.asarray(np.nan, x.dtype), x),
        jnp.where(nobodys, jnp.float32(np.nan), x_scales),
        *rest,
    )
    got = interpreted.run(kernel(tiling, sms, True), *given, jnp.asarray(sizes, jnp.int32))
    np.testing.assert_array_equal(got, by_loop(x, x_scales, *rest, sizes))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_row_is_visited_by_its_expert(sizes):
    visits, experts = map(np.asarray, row_blocks.row_blocks(jnp.asarray(sizes), M, 128))
    found = [
        (row, expert)
        for block, (first, count) in enumerate(visits)
        for expert, start, end in experts[first : first + count]
        for row in range(max(start, block * 128), min(end, block * 128 + 128))
    ]
    assert found == list(enumerate(np.repeat(range(E), sizes)))


@pytest.mark.parametrize(
    ("down", "across", "band"), [(1, 1, 8), (7, 3, 2), (8, 5, 8), (9, 4, 8), (3, 7, 1)]
)
def test_each_tile_has_one_number(down, across, band):
    numbers = jnp.arange(down * across, dtype=jnp.int32)
    row, column = matmul_tiling.position(numbers, down, across, band)
    found = list(zip(np.asarray(row), np.asarray(column), strict=True))
    assert sorted(found) == [(i, j) for i in range(down) for j in range(across)]
    first_band = found[: min(band, down) * across]
    assert max(row for row, _ in first_band) == min(band, down) - 1


@pytest.mark.parametrize(
    ("shape", "experts", "name"),
    [
        ((4096, 1536, 7168), 1, "128x128 in pairs"),  # W^DQ: few tiles
        ((4096, 24576, 1536), 1, "256x128 in pairs"),  # W^UQ
        ((4096, 640, 7168), 1, "256x128"),  # W^DKV and W^KR, 576 padded: 5 columns of tiles
        ((4096, 7168, 16384), 1, "256x128 in pairs"),  # W^O
        ((32768, 4096, 7168), 4, "256x128 in pairs"),  # gate and up of 4 experts
        ((32768, 4096, 7168), 32, "128x256 in pairs"),  # of 32: lower tiles, less cut by experts
    ],
)
def test_tilings_of_the_model(shape, experts, name):
    assert str(matmul_tiling.choose(PRODUCT_TILINGS, shape, experts, 132)) == name


def test_a_tiling_that_does_not_divide_the_result():
    with pytest.raises(ValueError, match="in tiles of 256x128 in pairs cannot compute 256 x 128"):
        jax.eval_shape(kernel(PRODUCT_TILINGS[3], 2, False), *operands(128, 1), None)


def test_a_shape_that_no_tiling_fits():
    with pytest.raises(ValueError, match="no tiling fits 128 x 576; pad both to multiples of 128"):
        matmul_tiling.choose(PRODUCT_TILINGS, (128, 576, 7168), 1, 132)
