"""Products of compiled programs by the type of their operands."""

import collections

import jax
import pytest
import small

from deepseek_jax.aot import cluster, compiled, cost_model, hlo, layer, products
from deepseek_jax.kernels.kernel_names import OUTER, PRODUCT, QUANTISE
from deepseek_jax.precision.recipes import BFLOAT16, Fp8Recipe
from deepseek_jax.precision.scopes import PRODUCTS, WEIGHT_GRADIENT

pytestmark = pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "")

# W^DQ, W^UQ, W^DKV with W^KR, W^UK with W^UV, W^O; two of the shared expert, two of the others.
LINEAR = 9
# Inputs as rows, once for W^DQ and W^DKV and once for the shared expert and the message to others,
# which multiply what arrives as it is; and as tokens. Gradients of the 7 outputs that are not of
# experts. Of those that are, one is quantised twice, and one for its message, and for its tokens
# where it arrives. And what backward keeps: inputs of W^O and of 2 SwiGLU.
QUANTISED = 7 + 8 + 7 + 2 + 2 + 3
# Two of the attention core and four of its backward, three of the router, three that count tokens.
OTHERS = 6 + 3 + 3


PROGRAM = """HloModule jit_step, is_scheduled=true

%dequantise (values: f8e4m3fn[64,128], scales: f32[64,128]) -> bf16[64,128] {
  %values = f8e4m3fn[64,128]{1,0} parameter(0)
  %wide = f32[64,128]{1,0} convert(%values)
  %scales = f32[64,128]{1,0} parameter(1)
  %product = f32[64,128]{1,0} multiply(%wide, %scales)
  ROOT %rounded = bf16[64,128]{1,0} convert(%product)
}

%body (state: (bf16[64,128], bf16[64,128])) -> (bf16[64,128], bf16[64,128]) {
  %state = (bf16[64,128]{1,0}, bf16[64,128]{1,0}) parameter(0)
  %kept = bf16[64,128]{1,0} get-tuple-element(%state), index=0
  %moved = bf16[64,128]{1,0} get-tuple-element(%state), index=1
  %next = bf16[64,128]{1,0} add(%moved, %kept)
  ROOT %out = (bf16[64,128]{1,0}, bf16[64,128]{1,0}) tuple(%kept, %next)
}

ENTRY %main (values: f8e4m3fn[64,128], scales: f32[64,128]) -> f32[64,64] {
  %values.1 = f8e4m3fn[64,128]{1,0} parameter(0)
  %scales.1 = f32[64,128]{1,0} parameter(1)
  %x = bf16[64,128]{1,0} fusion(%values.1, %scales.1), kind=kLoop, calls=%dequantise
  %computed = bf16[64,128]{1,0} exponential(%x)
  %initial = (bf16[64,128]{1,0}, bf16[64,128]{1,0}) tuple(%x, %x)
  %loop = (bf16[64,128]{1,0}, bf16[64,128]{1,0}) while(%initial), condition=%c, body=%body
  %kept.1 = bf16[64,128]{1,0} get-tuple-element(%loop), index=0
  %moved.1 = bf16[64,128]{1,0} get-tuple-element(%loop), index=1
  ROOT %out.1 = f32[64,64]{1,0} dot(LEFT, RIGHT), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
"""


@pytest.mark.parametrize(
    ("left", "right", "in_fp8"),
    [
        ("%x", "%x", True),
        ("%x", "%kept.1", True),
        ("%computed", "%x", False),
        ("%x", "%computed", False),
        ("%x", "%moved.1", False),
    ],
)
def test_both_operands_are_tiles_times_scales(left, right, in_fp8):
    module = hlo.parse(PROGRAM.replace("LEFT", left).replace("RIGHT", right))
    assert products.counts(module) == {(products.OTHER, in_fp8): 1}


def layer_of_experts(**changes):
    """One layer's forward and backward, compiled for four devices, with messages in FP8."""
    fp8 = dict(precision_recipe="fp8", precision_dispatch="fp8")
    config = small.config(**fp8, mesh_node=2, mesh_gpu=2, **changes)
    mesh = cluster.mesh(config.mesh)
    return compiled.read(cluster.compile_for(layer.lower(config, mesh)), mesh, layer.KERNELS)


def test_each_linear_of_a_layer_has_three_kernels():
    """In experts as wide as a block: gate and up of narrower ones would cut blocks."""
    program = layer_of_experts(model_d_expert=128)
    found = list(products.products(program.module, layer.KERNELS))
    linear = {
        (kind, True, OUTER if kind == WEIGHT_GRADIENT else PRODUCT): LINEAR for kind in PRODUCTS
    }
    assert collections.Counter((each.kind, each.in_fp8, each.kernel) for each in found) == {
        **linear, (products.OTHER, False, ""): OTHERS
    }  # fmt: skip
    assert products.kernel_counts(program.module) == {
        PRODUCT: 2 * LINEAR, OUTER: LINEAR, QUANTISE: QUANTISED
    }  # fmt: skip
    assert list(products.fp8_casts(program.module)) == []
    # The scheduler is told the time of a kernel as that of a product with FP8 operands.
    rates = cost_model.Rates(flops_fp8=1.0, memory_bytes=1e30)
    costs = cost_model.costs(program, rates)
    for each in found:
        if each.kernel:
            assert costs[_scheduling_name(program, each)] == each.gemm.flops > 0


def _scheduling_name(program, product):
    lines = program.module.computations[program.module.entry]
    return lines[product.gemm.name].scheduling_name


def counted():
    module = layer_of_experts(precision_kernels="portable").module
    return products.counts(module, layer.KERNELS)


@pytest.mark.slow
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
