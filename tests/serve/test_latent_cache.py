"""Latent cache: bytes per token, and values read back."""

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
    [("bfloat16", False, 70_272), ("bfloat16", True, 71_424), ("fp8", False, 40_016)],
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
