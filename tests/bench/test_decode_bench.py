"""`bench decode`: equal attention with both caches, cache bytes, and all rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from configs import v3_671b
from deepseek_jax import config as configs
from deepseek_jax.bench import decode
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.mla import LatentAttention
from deepseek_jax.serve import latent_cache


def test_both_caches_give_the_same_attention():
    config = small.config().model
    attention = LatentAttention(config, rngs=nnx.Rngs(params=0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, config.d_model)), jnp.float32)
    positions = jnp.array([[0, 1, 2, 3, 4]] * 2)
    layer = dataclasses.replace(config, layers=1, dense_layers=0)

    @jax.jit
    def run(attention, x):
        latents = latent_cache.make(layer, 2, 8, "float32", mtp=False).moe
        expanded = decode._Expanded.empty(config, 2, 8)
        over_latents, _ = attention.decode(x, Execution(), latents, 0, positions)
        return attention(x, Execution()), over_latents, expanded.decode(attention, x, positions)[0]

    want, *both = run(attention, x)
    for got in both:
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_bytes_are_those_of_the_config():
    rows = decode._cache_rows(configs.parse(v3_671b.get_config()).model)
    told = {row["cache"]: row["bytes_per_token"] for row in rows}
    assert told["latent, bfloat16"] == 70_272 and told["latent, fp8"] == 39_284
    assert told["every head, bfloat16"] == 3_997_696


def test_rows(monkeypatch):
    """Beside a function that returns token 0 at once."""
    config = small.config(model_layers=1)  # dense, and quick to compile
    monkeypatch.setattr(decode, "sized", lambda _: config)
    zeros = lambda prompts, tokens: np.zeros((len(prompts), tokens), int)  # noqa: E731
    monkeypatch.setattr(decode, "_hugging_face", lambda model: zeros)
    found = decode.measure(config, tokens=3, rounds=1, lengths=(16, 32))
    assert [row["batch"] for row in found["decode"]] == [1, 8]
    for row in found["decode"]:
        assert row["of_hugging_face"] == row["tokens_per_second"] / row["hugging_face"] > 0
        assert 0 <= row["same_tokens"] < 1
    assert [row["cache_length"] for row in found["attention"]] == [16, 32]
    for row in found["attention"]:
        per_token = row["expanded_us_per_token"], row["latent_us_per_token"]
        assert row["expanded_of_latent"] == pytest.approx(per_token[0] / per_token[1])
