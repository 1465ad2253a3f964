"""Products of compiled programs by the type of their operands."""

import jax
import pytest
import small

from deepseek_jax.aot import cluster, hlo, layer, products
from deepseek_jax.precision.recipes import BFLOAT16, Fp8Recipe
from deepseek_jax.precision.scopes import PRODUCTS

pytestmark = pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "")

# W^DQ, W^UQ, W^DKV with W^KR, W^UK with W^UV, W^O; two of the shared expert, two of the others.
LINEAR = 9
# Two of the attention core and four of its backward, three of the router, three that count tokens.
OTHERS = 6 + 3 + 3


def counted():
    config = small.config(precision_recipe="fp8", mesh_node=2, mesh_gpu=2)
    lowered = layer.lower(config, cluster.mesh(config.mesh))
    module = hlo.parse(cluster.compile_for(lowered).as_text())
    return products.counts(module, layer.KERNELS)


def test_each_linear_of_a_layer_has_three_products_in_fp8():
    linear = {(kind, True): LINEAR for kind in PRODUCTS}
    assert counted() == {**linear, (products.OTHER, False): OTHERS}


@pytest.mark.slow
def test_a_linear_in_bfloat16_is_seen(monkeypatch):
    """W^DQ, the one weight of this shape, in BF16."""
    prepare, einsum = Fp8Recipe.prepare, Fp8Recipe.einsum

    def prepared(self, weight, *, sensitive, linear=None):
        if weight.shape == (32, 16):
            return BFLOAT16.prepare(weight, sensitive=sensitive)
        return prepare(self, weight, sensitive=sensitive, linear=linear)

    def product(self, subscripts, x, weight):
        if isinstance(weight, jax.Array):
            return BFLOAT16.einsum(subscripts, x, weight)
        return einsum(self, subscripts, x, weight)

    monkeypatch.setattr(Fp8Recipe, "prepare", prepared)
    monkeypatch.setattr(Fp8Recipe, "einsum", product)
    linear = {(kind, True): LINEAR - 1 for kind in PRODUCTS}
    assert counted() == {**linear, (products.OTHER, False): OTHERS + len(PRODUCTS)}
