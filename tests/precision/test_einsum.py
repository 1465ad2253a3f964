"""Sums over rows of equal index: the form of GPUs against that of CPUs, on whole numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.precision import einsum

pytestmark = pytest.mark.usefixtures("strict_dtypes")

ROWS = 5


@pytest.mark.parametrize("sums", [einsum.sums_by_scatter, einsum.sums_by_matmul])
@pytest.mark.parametrize("count", [1, 7, 8, 19, 64])
def test_sums_of_equal_indices(sums, count, monkeypatch):
    """More and fewer positions than a block, which they need not fill."""
    monkeypatch.setattr(einsum, "BLOCK", 8)
    rng = np.random.default_rng(count)
    index = rng.integers(0, ROWS, count).astype(np.int32)
    x = rng.integers(-8, 8, (count, 3)).astype(np.float32)
    want = np.zeros((ROWS, 3))
    np.add.at(want, index, x)
    got = sums(ROWS, jnp.asarray(index), jnp.asarray(x, jnp.bfloat16))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("sums", [einsum.sums_by_scatter, einsum.sums_by_matmul])
def test_a_frequent_row(sums):
    """4,096 ones: in bfloat16 their sum would stay at 256."""
    index, ones = jnp.zeros((4096,), jnp.int32), jnp.ones((4096, 2), jnp.bfloat16)
    np.testing.assert_array_equal(sums(2, index, ones), [[4096, 4096], [0, 0]])


def test_a_transpose_is_fused_with_nothing():
    """Fused with the operation before it, it takes four times as long on a CPU."""
    x = jnp.arange(192, dtype=jnp.float32).reshape(4, 6, 8)
    program = jax.jit(lambda x: einsum.transposed("BSD->DBS", x + 1)).lower(x).compile()
    np.testing.assert_array_equal(program(x), (x + 1).transpose(2, 0, 1))
    assert " call(" in program.as_text()
