"""Attention by a kernel: its residuals under each recompute policy, gradients, and its check."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.kernels import attention_cudnn, kernel_names
from deepseek_jax.kernels.attention_cudnn import AttentionKernel
from deepseek_jax.model import attention_check, remat
from deepseek_jax.model.causal_attention import FusedAttention
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.mla import attend_and_project
from deepseek_jax.precision import weight_gradients
from deepseek_jax.precision.fp8_weights import Linear
from deepseek_jax.precision.recipes import BFLOAT16, FP8

pytestmark = pytest.mark.usefixtures("strict_dtypes")

B, S, H, X, W, D = 1, 48, 2, 24, 16, 32
KERNELS = frozenset({kernel_names.ATTENTION})


def shapes():
    return (B, S, H, X), (B, S, H, X), (B, S, H, W), (B, S, D)


def pulled(recipe, policy):
    """Function of the weight W^O, queries, keys and values -> output, VJP under a policy."""
    how = Execution(recipe=recipe, remat=policy, attention_block=16)
    project = functools.partial(recipe.einsum, "BSHW,HWD->BSD")

    def attend(weight, *inputs):
        return attend_and_project(*inputs, project, weight, how, 0.2)

    def run(master, *inputs):
        linear = Linear.whole("iio", master.shape)
        weight = recipe.prepare(master, sensitive=False, linear=linear)
        return weight_gradients.vjp(policy.layer(attend), weight, *inputs)

    return run


def residuals(recipe, policy):
    """(shape, dtype) of what backward keeps, without weight, queries, keys and values."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes()[:3]]
    master = jax.ShapeDtypeStruct((H, W, D), jnp.float32)
    _, pull = jax.eval_shape(pulled(recipe, policy), master, *inputs)
    given = [*shapes()[:3], (H, W, D), (1, 1)]  # the last of scales
    found = ((x.shape, x.dtype.name) for x in jax.tree.leaves(pull))
    return sorted(each for each in found if each[0] not in given)


def results(recipe):
    """Output, gradient of W^O, and gradients of queries, keys and values."""
    random = np.random.default_rng(0)
    *inputs, pull = (jnp.asarray(random.normal(size=each), jnp.bfloat16) for each in shapes())
    master = jnp.asarray(random.normal(size=(H, W, D)), jnp.float32)

    def both(*given):
        out, back = pulled(recipe, remat.REPORT)(*given)
        return out, *back(pull)

    return jax.jit(both)(master, *inputs)


@pytest.mark.parametrize("recipe", [BFLOAT16, FP8], ids=lambda recipe: recipe.name)
def test_backward_has_the_output_once_and_no_scores(recipe):
    """FP8: in 12 bits and a scale; the gradient of W^O reads the same, and not E4M3 beside it."""
    recipe = dataclasses.replace(recipe, kernels=KERNELS)
    sums = (B, H, S), "float32"
    output = {
        "bfloat16": [((B, S, H * W), "bfloat16")],
        "fp8": [((B, S, H), "uint8"), ((B, S, H * W // 2), "uint8"), ((B, S, H * W), "uint8")],
    }[recipe.name]
    assert residuals(recipe, remat.REPORT) == sorted([*output, sums])
    assert residuals(recipe, remat.ATTENTION) == residuals(recipe, remat.FULL) == []


@pytest.mark.parametrize("recipe", [BFLOAT16, FP8], ids=lambda recipe: recipe.name)
def test_on_a_cpu_the_results_are_those_without_a_kernel(recipe):
    """To the bit, but the gradient of W^O in FP8: its tiles are made of a finer form of the output.

    E4M3 rounds a number by 2^-4 at most, and tiles along tokens round it again.
    """
    out, d_weight, *gradients = results(recipe)
    own, d_own, *own_gradients = results(dataclasses.replace(recipe, kernels=KERNELS))
    np.testing.assert_array_equal(own, out)
    for got, want in zip(own_gradients, gradients, strict=True):
        np.testing.assert_array_equal(got, want)
    d_weight, d_own = (np.asarray(each, np.float32) for each in (d_weight, d_own))
    bound = 0 if recipe is BFLOAT16 else 2**-4 * np.abs(d_weight).max()
    np.testing.assert_allclose(d_own, d_weight, atol=bound, rtol=0)


def test_the_kernel_is_not_asked_where_cudnn_refuses():
    """Float32, and widths that are no multiple of 8: the portable form, without a choice."""
    how = Execution(recipe=dataclasses.replace(BFLOAT16, kernels=KERNELS))
    for width, dtype in ((12, jnp.bfloat16), (16, jnp.float32)):
        given = [jax.ShapeDtypeStruct((1, 16, 2, width), dtype)] * 3
        weight = jax.ShapeDtypeStruct((2, width, 8), jnp.bfloat16)
        project = functools.partial(how.recipe.einsum, "BSHW,HWD->BSD")
        found = jax.make_jaxpr(
            lambda *parts, how=how, project=project: attend_and_project(
                *parts[:3], project, parts[3], how, 0.2
            )
        )(*given, weight)
        assert "fmha" not in str(found) and "platform_index" not in str(found)


def softmax_in_full(query, key, value, *, scale, mask):
    """Forward of a kernel, in one block and with another order of its divisions."""
    scores = scale * jnp.einsum("BSHX,BTHX->BHST", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.tri(query.shape[1], k=mask)[None, None] > 0, scores, -jnp.inf)
    log_sums = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - log_sums[..., None]).astype(value.dtype)
    out = jnp.einsum("BHST,BTHW->BSHW", weights, value, preferred_element_type=jnp.float32)
    return out.astype(value.dtype), log_sums


@pytest.mark.parametrize(
    ("mask", "factor", "passes"), [(0, 1.0, True), (1, 1.0, False), (0, 1.1, False)]
)
def test_the_check_passes_another_order_and_nothing_else(monkeypatch, mask, factor, passes):
    """A mask that is off by one, and another scale, are found."""

    def forward(query, key, value, *, scale):
        return softmax_in_full(query, key, value, scale=factor * scale, mask=mask)

    def backward(query, key, value, out, log_sums, d_out, *, scale):
        parts = lambda *parts: forward(*parts, scale=scale)[0]  # noqa: E731
        return jax.vjp(parts, query, key, value)[1](d_out)

    kernel = AttentionKernel(forward, backward)
    monkeypatch.setitem(attention_cudnn.BY_NAME, kernel_names.ATTENTION, kernel)
    check = attention_check.causal(kernel_names.ATTENTION)
    assert bool(jax.jit(check.agrees)().all()) == passes


def test_the_check_of_absorbed_attention_finds_a_mask_that_is_off_by_one():
    check = attention_check.latent()
    off = functools.partial(check.portable, shift=1)
    wrong = dataclasses.replace(check, kernel=off)
    assert jax.jit(wrong.differences)()[1] > 4 * check.tolerance  # of the short request


def test_every_kernel_of_attention_has_a_check():
    """As many results as the check says: where one is missing, the kernel would never be used."""
    found = attention_check.checks()
    assert found.keys() == BFLOAT16.known_kernels
    for name, check in found.items():
        if name != kernel_names.ATTENTION_PADDED:  # without a GPU, JAX refuses to trace it
            kernel = attention_check.latent() if "latent" in name else attention_check.causal(name)
            assert jax.eval_shape(kernel.agrees).shape == check.portable().shape


def test_logarithms_of_sums():
    random = np.random.default_rng(0)
    shapes = (B, S, H, X), (B, S, H, X), (B, S, H, W)
    parts = [jnp.asarray(random.normal(size=each), jnp.float32) for each in shapes]
    core = FusedAttention(attention_cudnn.UNPADDED, 0.2, 20)
    out, log_sums = jax.jit(functools.partial(core.in_blocks().forward, scale=0.2))(*parts)
    want, want_sums = softmax_in_full(*parts, scale=0.2, mask=0)
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_allclose(log_sums, want_sums, atol=1e-6)
