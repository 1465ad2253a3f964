"""Products of packed weights against NumPy, for widths that parts divide and others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.precision import packed_product


@pytest.mark.parametrize("depth, columns", [(40, 64), (33, 70), (24, 51)])
def test_products_of_either_packing(depth, columns):
    rng = np.random.default_rng(0)
    rows, weight = rng.normal(size=(5, depth)), rng.normal(size=(depth, columns))
    want = rows @ weight
    narrow, weight = jnp.asarray(rows, jnp.float32), jnp.asarray(weight, jnp.float32)

    packed = packed_product.pack_columns(weight)
    assert packed.shape == ((2, columns // 2, depth) if columns % 2 == 0 else (1, columns, depth))
    got = jax.jit(packed_product.product)(narrow, packed)
    np.testing.assert_allclose(got.T, want, atol=1e-5 * np.abs(want).max())

    packed = packed_product.pack_sum(weight)
    assert packed.shape == ((2, columns, depth // 2) if depth % 2 == 0 else (1, columns, depth))
    got = jax.jit(packed_product.sum_product)(narrow.T, packed)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_rows_of_bfloat16_are_summed_in_float32():
    rows, weight = jnp.full((1, 1024), 0.5, jnp.bfloat16), jnp.full((1024, 64), 1.0)
    packed = packed_product.pack_columns(weight)
    got = packed_product.product(rows, packed, jnp.float32)
    assert got.dtype == jnp.float32 and (got == 512).all()
    assert packed_product.product(rows, packed).dtype == jnp.bfloat16
    summed = packed_product.sum_product(rows.T, packed_product.pack_sum(weight))
    assert summed.dtype == jnp.bfloat16 and (summed == 512).all()
