"""Products of packed weights against NumPy, for widths that strips divide and others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.precision import packed_product


@pytest.mark.parametrize("columns, count", [(64, 3), (192, 9), (96, 3)])
def test_a_product_from_strips(columns, count):
    rng = np.random.default_rng(0)
    rows, weight = rng.normal(size=(3, 5, 40)), rng.normal(size=(3, 40, columns))
    cut = packed_product.pack(jnp.asarray(weight, jnp.float32))
    assert cut.shape == (count, 40, columns * 3 // count)
    got = jax.jit(packed_product.packed_product)(jnp.asarray(rows, jnp.float32), cut)
    np.testing.assert_allclose(got, rows @ weight, atol=1e-5 * np.abs(rows @ weight).max())


def test_rows_of_bfloat16_are_summed_in_float32():
    rows, weight = jnp.full((1, 1, 1024), 0.5), jnp.full((1, 1024, 64), 1.0)
    half = rows.astype(jnp.bfloat16)
    got = packed_product.packed_product(half, packed_product.pack(weight), jnp.float32)
    assert got.dtype == jnp.float32 and (got == 512).all()
    assert packed_product.packed_product(half, packed_product.pack(weight)).dtype == jnp.bfloat16
