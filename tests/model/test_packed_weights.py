"""Packed weights for few tokens on a CPU: decoding equals that of the plain model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from published import variant

from deepseek_jax.model import decoding
from deepseek_jax.model.decoding import Unstacked
from deepseek_jax.model.execution import Execution
from deepseek_jax.serve import latent_cache

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.parametrize("requests", [1, 8, 20], ids=["one token", "eight", "many"])
def test_it_decodes_the_same(requests):
    _, _, model = variant("v3")
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, model.config.vocab, (requests, 2)), jnp.int32)
    positions = jnp.broadcast_to(jnp.array([[3, 4]]), tokens.shape)

    def logits(model, tokens, past):
        top, past = decoding.decode(model, tokens, Execution(), past, positions)
        return model.head(top), past

    results = []
    for on_cpu in (False, True):
        past = latent_cache.make(model.config, requests, 8, "float32", mtp=False, per_layer=True)
        unstacked = Unstacked.of(model, on_cpu=on_cpu)
        results.append(jax.device_get(jax.jit(logits)(unstacked, tokens, past)))
    small.assert_close(results[1], results[0], 3e-6)
