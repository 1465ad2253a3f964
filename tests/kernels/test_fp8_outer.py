"""The FP8 outer product kernel in JAX's interpreter, exactly, for any blocks of tokens."""

import dataclasses

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scaled

from deepseek_jax.kernels import fp8_outer
from deepseek_jax.kernels.matmul_tiling import OUTER, OUTER_TILINGS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

K, N, BLOCKS = 128, 256, 4  # BLOCKS of 128 tokens


def outer(tiling, sms, *given):
    """Two stages, so that the ring turns."""
    tiling = dataclasses.replace(tiling, stages=2, band=1)

    def run(*given):
        return fp8_outer.outer(*given, tiling=tiling, sms=sms, interpret=interpreted.GPU)

    return interpreted.run(jax.jit(run), *given)


def operands():
    return (
        scaled.values(K, BLOCKS * 128, seed=0),
        scaled.scales(BLOCKS, K, seed=1),
        scaled.values(N, BLOCKS * 128, seed=2),
        scaled.scales(BLOCKS, N, seed=3),
    )


def by_loop(x, x_scales, y, y_scales, blocks):
    x, y = scaled.whole(x, x_scales.T), scaled.whole(y, y_scales.T)
    ends = np.cumsum(blocks) * 128
    tokens = [slice(end - 128 * count, end) for end, count in zip(ends, blocks, strict=True)]
    return np.stack([x[:, own] @ y[:, own].T for own in tokens])


@pytest.mark.parametrize(
    ("tiling", "sms", "blocks"),
    [
        (OUTER, 1, (2, 0, 1)),
        (OUTER_TILINGS[1], 2, (2, 0, 1)),
        *(
            pytest.param(OUTER, 3, blocks, marks=pytest.mark.slow)
            for blocks in [(4,), (0, 0), (0, 4, 0), (1, 1, 1, 1)]
        ),
    ],
    ids=str,
)
def test_outer_products_are_exact(tiling, sms, blocks):
    """Experts with and without tokens; blocks of nobody are NaN."""
    if tiling.pair and not interpreted.PAIRS:
        pytest.skip("the interpreter of this jax has no clusters")
    x, x_scales, y, y_scales = operands()
    nobodys = np.arange(BLOCKS) >= sum(blocks)
    got = outer(
        tiling,
        sms,
        jnp.where(nobodys.repeat(128), jnp.asarray(np.nan, x.dtype), x),
        jnp.where(nobodys[:, None], jnp.float32(np.nan), x_scales),
        y,
        y_scales,
        jnp.asarray(blocks, jnp.int32),
    )
    np.testing.assert_array_equal(got, by_loop(x, x_scales, y, y_scales, blocks))


@pytest.mark.slow
def test_one_expert_has_all_blocks():
    given = operands()
    np.testing.assert_array_equal(outer(OUTER, 1, *given), by_loop(*given, [BLOCKS]))
