"""Decoding with V3.2's indexer: the tokens of the form that is trained, beyond top-k positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving
import small

from deepseek_jax.model import decoding
from deepseek_jax.serve import latent_cache
from deepseek_jax.serve.requests import Request

TOP_K = 6
REQUESTS = [Request((1, 2, 3), 16), Request(tuple(range(4, 17)), 9), Request((5,), 4)]


@functools.cache
def model(depth=0):
    return serving.model(depth, index_top_k=TOP_K)


@functools.cache
def whole():
    """Greedy tokens of each request from the trained form, over the whole text each time."""
    made = []
    run = jax.jit(lambda model, text: model(text, serving.HOW)[0][0])
    for request in REQUESTS:
        text = list(request.prompt)
        for _ in range(request.max_tokens):
            padded = jnp.array([text + [0] * (32 - len(text))])
            text.append(int(run(model(), padded)[0, len(text) - 1].argmax()))
        made.append(text[len(request.prompt) :])
    return made


SPREAD = dict(slots=4, drafts=2, sizes={"node": 2, "tensor": 2}, rules=small.NARROW)


@pytest.mark.parametrize(
    "depth, layout",
    [
        (0, dict(unroll=2)),
        (1, dict(drafts=1)),
        pytest.param(0, dict(steps=4), marks=pytest.mark.slow),
        pytest.param(1, SPREAD, marks=pytest.mark.slow),
    ],
    ids=["per layer", "drafts", "stacked", "spread, drafts"],
)
def test_engine_makes_the_tokens_of_the_trained_form(depth, layout):
    assert serving.server(model(depth), **layout).run(REQUESTS) == whole()


def test_room_for_no_more_than_top_k_is_attention_to_all():
    """With as much room as is selected, logits equal those of V3 to the bit."""
    v32, v3 = serving.model(0, index_top_k=16), serving.model(0)
    v3 = jax.tree.unflatten(
        jax.tree.structure(v3),
        [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(v32)
            if "index" not in str(path)
        ],
    )
    tokens = jnp.arange(16)[None]

    def run(model):
        top, kept = decoding.prefill(model, tokens[:, :9], serving.HOW, mtp=False)
        past = latent_cache.make(model.config, 1, 16, "float32", mtp=False)
        past = past.admit(jnp.arange(1), kept)
        positions = jnp.arange(9, 16)[None]
        return top, decoding.decode(model, tokens[:, 9:], serving.HOW, past, positions)[0]

    for own, want in zip(jax.jit(run)(v32), jax.jit(run)(v3), strict=True):
        np.testing.assert_array_equal(own, want)


@pytest.mark.parametrize("form, error", [("float32", 0), ("bfloat16", 2**-8), ("fp8", 2**-4)])
@pytest.mark.parametrize("per_layer", [False, True], ids=["stacked", "per_layer"])
def test_index_keys_and_gathered_latents_are_what_was_written(form, error, per_layer):
    config, rng = model().config, np.random.default_rng(0)
    widths = config.kv_latent, config.d_rope, config.index_width
    kept = tuple(jnp.asarray(rng.normal(size=(2, 3, width)), jnp.float32) for width in widths)
    past = latent_cache.make(config, 2, 8, form, mtp=False, per_layer=per_layer).moe
    past = past.write(0, jnp.array([[1, 2, 3], [5, 6, 7]]), kept)
    keys = past.read_index(0, jnp.float32)
    np.testing.assert_allclose(keys[0, 1:4], kept[2][0], rtol=error, atol=error * 2e-2)
    np.testing.assert_allclose(keys[1, 5:], kept[2][1], rtol=error, atol=error * 2e-2)
    chosen = jnp.array([[[3, 1]], [[7, 5]]])
    latent, key_rope = past.gather(0, chosen, jnp.float32)
    assert latent.shape == (2, 1, 2, widths[0]) and key_rope.shape == (2, 1, 2, widths[1])
    error = max(error, 1e-30)
    for got, want in zip((latent, key_rope), kept, strict=False):
        np.testing.assert_allclose(got[:, 0], want[:, [2, 0]], rtol=error, atol=error * 2e-2)
