"""Latent attention against equations 1 to 11, in any blocks and with heads split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from equations import attention
from equations.norm import part
from published import layer, variant

from deepseek_jax.kernels import kernel_names
from deepseek_jax.kernels import latent_attention as latent_kernel
from deepseek_jax.model.absorbed_attention import latent_attention
from deepseek_jax.model.causal_attention import causal_attention
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.mla import LatentAttention
from deepseek_jax.serve import latent_cache

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def inputs(length, width=48, batch=2, seed=0):
    x = np.random.default_rng(seed).normal(size=(batch, length, width))
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("rule", ["v3", "no_q_latent", "yarn", "yarn_v2", "yarn_ratio", "v32"])
def test_follows_the_equations(rule):
    settings, weights, model = variant(rule)
    x = inputs(160 if "yarn" in rule else 40)  # YaRN: past the original 64
    module = layer(model.moe_layers, 1).attention
    got = jax.jit(lambda m, x: m(x, Execution(attention_block=48)))(module, x)
    own = part(weights, "model.layers.2.self_attn")
    want = attention.attention(np.asarray(x, np.float64), own, settings)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    "rule, form, error",
    [
        ("v3", "float32", 2e-5),
        ("no_q_latent", "float32", 2e-5),
        ("yarn_ratio", "float32", 2e-5),
        ("v32", "float32", 2e-5),
        ("v3", "fp8", 2**-4),  # of a number, E4M3's error at worst
    ],
)
def test_absorbed_follows_the_equations(rule, form, error):
    """Four tokens at once, each request at a position of its own, from the cache alone."""
    settings, weights, model = variant(rule)
    x, starts = inputs(80), np.array([70, 23])
    module, how = layer(model.moe_layers, 1).attention, Execution()

    @jax.jit
    def run(module, x, starts):
        out, kept = module.prefill(x, how)
        past = latent_cache.make(model.config, 2, 80, form, mtp=False).moe
        before = jnp.arange(80)[None] < starts[:, None]
        past = past.write(1, jnp.where(before, jnp.arange(80)[None], 80), kept)
        positions = starts[:, None] + jnp.arange(4)[None]
        new = jnp.take_along_axis(x, positions[..., None], axis=1)
        return out, *module.decode(new, how, past, 1, positions)

    trained, got, past = run(module, x, jnp.asarray(starts))
    wide, own = np.asarray(x, np.float64), part(weights, "model.layers.2.self_attn")
    want = attention.absorbed(wide, own, settings)
    latent, key_rope = attention.cached(wide, own, settings)
    size = np.abs(want).max()
    for request, start in enumerate(starts):
        here = slice(start, start + 4)
        np.testing.assert_allclose(got[request], want[request, here], atol=error * size)
        np.testing.assert_allclose(got[request], trained[request, here], atol=error * size)
        for own, true in zip(past.read(1, jnp.float32), (latent, key_rope), strict=True):
            end, most = start + 4, np.abs(true).max()
            np.testing.assert_allclose(own[request, :end], true[request, :end], atol=error * most)


@pytest.mark.parametrize("block", [7, 16, 40])
@pytest.mark.parametrize("keep", [False, True])
def test_blocks_of_queries_change_nothing(block, keep):
    rng = np.random.default_rng(0)
    shapes = [(2, 40, 3, 10), (2, 40, 3, 10), (2, 40, 3, 6), (2, 40, 3, 6)]
    *parts, pull = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def run(block, keep):
        def total(*parts):
            out = causal_attention(*parts, scale=0.3, block=block, keep_scores=keep)
            return jnp.sum(out * pull), out

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*parts)

    (_, want), want_grads = run(512, True)
    (_, got), got_grads = run(block, keep)
    np.testing.assert_allclose(got, want, atol=2e-6)
    small.assert_close(got_grads, want_grads, 2e-6)


def test_on_a_cpu_a_kernel_of_absorbed_attention_changes_nothing():
    rng = np.random.default_rng(0)
    shapes = (2, 2, 4, 128), (2, 2, 4, 64), (2, 64, 128), (2, 64, 64)
    given = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    given.append(jnp.array([[5, 6], [62, 63]], jnp.int32))
    kernels = frozenset({kernel_names.LATENT_ATTENTION})
    assert latent_kernel.takes(given[0], given[2], given[3])
    got = jax.jit(lambda *given: latent_attention(*given, 0.1, kernels))(*given)
    want = jax.jit(lambda *given: latent_attention(*given, 0.1))(*given)
    np.testing.assert_array_equal(got, want)


def test_sees_no_later_token():
    _, _, model = variant("v3")
    module, x = layer(model.moe_layers).attention, inputs(24)
    run = jax.jit(lambda x: module(x, Execution(attention_block=10)))
    before = run(x)
    after = run(x.at[:, 15:].add(1.0))
    np.testing.assert_array_equal(after[:, :15], before[:, :15])
    assert (jnp.abs(after[:, 15:] - before[:, 15:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("tensor", [2, 4])
def test_splitting_heads_changes_nothing(tensor):
    _, _, model = variant("v3")
    module, x, pull = layer(model.moe_layers).attention, inputs(20), inputs(20, seed=1)
    how = Execution(attention_block=8)

    def fn(module: LatentAttention, x: jax.Array) -> jax.Array:
        return module(x, how)

    want = jax.device_get(jax.jit(small.pulled, static_argnums=0)(fn, module, x, pull))
    small.assert_close(small.spread(fn, module, x, pull, {"tensor": tensor, "gpu": 2}), want, 3e-6)
