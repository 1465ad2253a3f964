"""FP8 products by kernels against the portable form, which they must equal to the bit.

Operands have values and scales whose sums are exact in any order (`scaled.py`).
"""

import dataclasses
import functools
import re

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scaled

from deepseek_jax.kernels.kernel_names import OUTER, PRODUCT, QUANTISE
from deepseek_jax.precision import grouped, weight_gradients
from deepseek_jax.precision.einsum import exact_einsum
from deepseek_jax.precision.expert_tiles import dequantise_rows, quantise_rows
from deepseek_jax.precision.fp8_form import Fp8Form
from deepseek_jax.precision.fp8_hopper import HopperProducts, takes
from deepseek_jax.precision.fp8_tiles import Tiles, dequantise_tiles
from deepseek_jax.precision.fp8_weights import Fp8Weight, Linear, quantise_blocks
from deepseek_jax.precision.recipes import recipe
from deepseek_jax.precision.token_tiles import quantise_tokens

pytestmark = pytest.mark.usefixtures("strict_dtypes")

M, K, N, E = 200, 200, 136, 3  # no size is a multiple of 128
SIZES = jnp.asarray([130, 0, 61], jnp.int32)  # the last 9 rows are nobody's
BFLOAT16 = jnp.bfloat16
HOPPER = HopperProducts(sms=1, pairs=False, interpret=interpreted.GPU)


def tiles(rows, columns, seed, axis=-1):
    shape = (rows, -(-columns // 128)) if axis == -1 else (-(-rows // 128), columns)
    return Tiles(scaled.values(rows, columns, seed=seed), scaled.scales(*shape, seed=seed + 1))


def weight(*experts):
    values = scaled.values(*experts, K, N, seed=8)
    return Fp8Weight(values, scaled.scales(*experts, 2, 2, seed=9))


def assert_equal(kernel, portable, *arguments):
    got, want = interpreted.run(jax.jit(kernel), *arguments), jax.jit(portable)(*arguments)
    assert got.dtype == want.dtype and np.abs(np.asarray(want, np.float32)).max() > 100
    np.testing.assert_array_equal(got, np.asarray(want))


def portable_product(x, w):
    whole = w.dequantised(x.values.shape[1], BFLOAT16)
    return exact_einsum("MK,KN->MN", dequantise_tiles(x, BFLOAT16), whole).astype(BFLOAT16)


def portable_input_gradient(d_out, w):
    whole = w.dequantised(K, BFLOAT16)
    d_x = exact_einsum("MN,KN->MK", dequantise_tiles(d_out, BFLOAT16), whole)
    return d_x.astype(BFLOAT16)


PLAN = grouped.plan(M, E, M)


def portable_grouped(x, w, sizes):
    whole = w.dequantised(K, BFLOAT16)
    return PLAN.product(dequantise_tiles(x, BFLOAT16), whole, sizes)


def portable_grouped_input_gradient(d_out, w, sizes):
    sent = dequantise_tiles(d_out, BFLOAT16)
    return PLAN.rows_gradient((sent, w.dequantised(K, BFLOAT16), sizes), sent)


def portable_grouped_weight_gradient(x, d_out):
    x, d_out = (dequantise_rows(quantise_rows(y, SIZES, True), SIZES, BFLOAT16) for y in (x, d_out))
    saved = x, jnp.zeros((0,), BFLOAT16), SIZES
    return PLAN.weight_gradient(saved, d_out, (E, K, N), jnp.float32)


def grouped_weight_gradient(x, d_out):
    return HOPPER.weight_gradient(*(quantise_tokens(y, SIZES, True) for y in (x, d_out)), SIZES)


@pytest.mark.slow  # as are those of experts below: `test_fp8_checks.py` computes them, too
def test_products_of_all_experts():
    kernel = functools.partial(HOPPER.product, dtype=BFLOAT16)
    assert_equal(kernel, portable_grouped, tiles(M, K, 0), weight(E), SIZES)


@pytest.mark.slow
def test_input_gradients_of_all_experts():
    kernel = functools.partial(HOPPER.input_gradient, dtype=BFLOAT16)
    assert_equal(kernel, portable_grouped_input_gradient, tiles(M, N, 2), weight(E), SIZES)


@pytest.mark.slow
def test_weight_gradients_of_all_experts():
    """Tiles along rows: three of 130 and 61 rows, and a fourth that no expert has."""
    given = [
        dequantise_rows(
            Tiles(scaled.values(M, width, seed=width), scaled.scales(4, width, seed=1)),
            SIZES,
            BFLOAT16,
        )
        for width in (K, N)
    ]
    assert_equal(grouped_weight_gradient, portable_grouped_weight_gradient, *given)


def layers(fp8, experts):
    """Output of a linear layer, or of those of all experts, and both gradients, jitted."""
    shape = (E, K, N) if experts else (K, N)
    linear = Linear.whole("-io" if experts else "io", shape)

    def product(weight, x):
        if experts:
            return fp8.grouped(x, weight, SIZES, M)
        return fp8.einsum("MK,KN->MN", x, weight)

    @jax.jit
    def run(weight, x, pull):
        prepared = fp8.prepare(weight, sensitive=False, linear=linear)
        out, vjp = weight_gradients.vjp(product, prepared, x)
        return out, *vjp(pull)

    return run


def inputs(experts):
    """Weight, input, and gradient of the output."""
    random = np.random.default_rng(0)
    return [
        jnp.asarray(random.normal(size=shape), dtype)
        for shape, dtype in (
            ((E, K, N) if experts else (K, N), jnp.float32), ((M, K), BFLOAT16), ((M, N), BFLOAT16)
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    "experts",
    [
        pytest.param(False, id="one matrix"),
        pytest.param(True, id="experts", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("scales", ["power_of_two", pytest.param("free", marks=pytest.mark.slow)])
def test_layers_of_a_recipe_with_kernels(scales, experts):
    """All three products of real numbers, to the rounding of sums in float32 to bfloat16."""
    portable = recipe("fp8", scales)
    kernels = dataclasses.replace(portable, kernels=portable.known_kernels, hopper=HOPPER)
    weight, x, pull = inputs(experts)
    got = interpreted.run(layers(kernels, experts), weight, x, pull)
    want = layers(portable, experts)(weight, x, pull)
    # Neighbours in bfloat16 are up to 2^-7 apart; the gradient of the weight is float32.
    for ours, theirs, rounding in zip(got, want, (2**-7, 1e-5, 2**-7), strict=True):
        theirs = np.asarray(theirs, np.float32)
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), theirs, rtol=rounding, atol=1e-6 * scale
        )


@pytest.mark.parametrize(
    "experts",
    [
        pytest.param(False, id="one matrix", marks=pytest.mark.slow),
        pytest.param(True, id="experts"),
    ],
)
def test_another_platform_computes_the_portable_form(monkeypatch, experts):
    """Of operands that are transposed for the kernels: the same bits."""
    portable = recipe("fp8")
    kernels = portable.with_kernels(portable.known_kernels, sms=132)
    given = inputs(experts)
    want = layers(portable, experts)(*given)
    monkeypatch.setattr(Fp8Form, "uses", lambda form, name: name in form.kernels)
    run = layers(kernels, experts)
    assert {PRODUCT, OUTER, QUANTISE} <= set(re.findall(r"\w+", str(run.trace(*given).jaxpr)))
    for ours, theirs in zip(run(*given), want, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_what_has_no_kernel_is_portable():
    """A kernel that is not in use, and a weight that the kernels do not take."""
    form = Fp8Form(kernels=frozenset({PRODUCT}), hopper=HOPPER)
    assert form.choose(PRODUCT, "portable", "kernel") == "kernel"
    assert form.choose(PRODUCT, "portable", "kernel", takes=False) == "portable"
    assert form.choose(OUTER, "portable", "kernel") == "portable"


@pytest.mark.slow
def test_one_matrix():
    product = functools.partial(HOPPER.product, dtype=BFLOAT16)
    assert_equal(product, portable_product, tiles(M, K, 0), weight())
    gradient = functools.partial(HOPPER.input_gradient, dtype=BFLOAT16)
    assert_equal(gradient, portable_input_gradient, tiles(M, N, 2), weight())


def test_weights_that_the_kernels_take():
    """Whole blocks; not a part of a device that cuts them, here of heads of 48 columns."""
    assert takes(weight(), K) and takes(weight(E), K)
    heads = Linear("ioo", (128, 8, 48), (0, 1, 0), (0, 1, 0), (128, 1, 48))
    part = quantise_blocks(jnp.ones((128, 1, 48)), heads, power_of_two=True)
    assert part.scales.shape == (1, 48) and not takes(part, 128)
