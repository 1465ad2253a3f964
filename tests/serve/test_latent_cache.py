"""Latent cache: bytes per token, and values read back."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from configs import v3_671b
from deepseek_jax import config as configs
from deepseek_jax.config import ConfigError
from deepseek_jax.precision.recipes import Recipe
from deepseek_jax.serve import latent_cache

V3 = configs.parse(v3_671b.get_config()).model


@pytest.mark.parametrize(
    "form, mtp, want",
    [("bfloat16", False, 70_272), ("bfloat16", True, 71_424), ("fp8", False, 39_284)],
)
def test_bytes_of_a_token_of_v3(form, mtp, want):
    assert latent_cache.bytes_per_token(V3, form, mtp=mtp) == want


@pytest.mark.parametrize("per_layer", [False, True], ids=["stacked", "per_layer"])
@pytest.mark.parametrize("form, error", [("float32", 0), ("bfloat16", 2**-8), ("fp8", 2**-4)])
def test_what_is_written_is_read(form, error, per_layer):
    """Writes change each request's own positions, and nothing where there is no room."""
    config = small.config(model_kv_latent=160).model  # a whole tile and a part of one
    rng = np.random.default_rng(0)
    kept = tuple(
        jnp.asarray(rng.normal(size=(2, 3, width)), jnp.float32) for width in (160, config.d_rope)
    )
    empty = latent_cache.make(config, 2, 8, form, mtp=False, per_layer=per_layer).moe
    past = empty.write(0, jnp.array([[1, 2, 3], [6, 7, 8]]), kept)
    latent, key_rope = past.read(0, jnp.float32)
    for got, want in zip((latent, key_rope), kept, strict=True):
        if form == "fp8" and got is key_rope:
            error = 2**-8
        np.testing.assert_allclose(got[0, 1:4], want[0], rtol=error, atol=error * 2e-2)
        np.testing.assert_allclose(got[1, 6:], want[1, :2], rtol=error, atol=error * 2e-2)
        assert not got[0, [0, 4, 5, 6, 7]].any() and not got[1, :6].any()


@pytest.mark.parametrize("position", [0, 7, 8])
def test_one_token_of_one_request(position):
    """Its row alone changes, and nothing does where there is no room."""
    config, rng = small.config().model, np.random.default_rng(0)
    widths = config.kv_latent, config.d_rope
    kept = tuple(jnp.asarray(rng.normal(size=(1, 1, width)), jnp.float32) for width in widths)
    empty = latent_cache.make(config, 1, 8, "float32", mtp=False).moe
    past = jax.jit(lambda at: empty.write(0, at, kept))(jnp.array([[position]]))
    for got, new in zip(past.read(0, jnp.float32), kept, strict=True):
        want = np.zeros(got.shape, np.float32)
        want[:, position : position + 1] = new[:, : 8 - position]
        np.testing.assert_array_equal(got, want)


def test_a_step_of_one_request_copies_no_cache():
    """The compiled loop of decoding updates the caches in place."""
    config = small.config().model
    past = latent_cache.make(config, 1, 32, "float32", mtp=False, per_layer=True).moe
    new = jnp.ones((1, 1, config.kv_latent)), jnp.ones((1, 1, config.d_rope))

    def step(number, carry):
        past, total = carry
        past = past.write(0, number.reshape(1, 1), new)
        latent, key_rope = past.read(0, jnp.float32)
        return past, total + jnp.einsum("BTC,BTR->CR", latent, key_rope)

    start = past, jnp.zeros((config.kv_latent, config.d_rope))
    compiled = jax.jit(lambda carry: jax.lax.fori_loop(0, 20, step, carry), donate_argnums=0)
    text = compiled.lower(start).compile().as_text()
    assert f"f32[1,1,32,{config.kv_latent}]" in text
    assert not re.findall(r"= f32\[1,1,32,\d+\]\S* copy\(", text)


def test_an_unknown_format_is_refused():
    with pytest.raises(
        ConfigError, match=r"engine\.cache=int4; expected one of float32, bfloat16, fp8"
    ):
        latent_cache.make(V3, 1, 1, "int4", mtp=False)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_default_format_follows_activations_and_not_the_name_of_the_recipe(name, dtype):
    recipe = Recipe(name, jnp.dtype(dtype))
    assert latent_cache.default_format(recipe) == dtype
