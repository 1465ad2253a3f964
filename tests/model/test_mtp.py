"""Multi-token prediction against equations 21 to 23, at every depth, and its targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import checkpoints
from equations.model import forward
from published import load

from deepseek_jax.model.execution import Execution

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def made(depth):
    """Checkpoint of any MTP depth, by the rules of `checkpoints`."""
    settings = checkpoints.make("v3")[0] | {"num_nextn_predict_layers": depth}
    rng = np.random.default_rng(depth)
    weights = {}
    for name, shape in checkpoints.shapes(settings):
        noise = rng.normal(size=shape)
        scale = 1.0 if "embed_tokens" in name else shape[-1] ** -0.5
        value = 1 + 0.2 * noise if len(shape) == 1 else noise * scale
        weights[name] = value.astype(np.float32)
    return settings, weights, load(settings, weights)


@pytest.mark.parametrize("depth", [0, 1, 4])  # the modules of 2 and 3 are among those of 4
def test_follows_the_equations(depth):
    settings, weights, model = made(depth)
    tokens = checkpoints.tokens(settings, length=24)
    logits, hidden = jax.jit(lambda m, t: m(t, Execution()))(model, jnp.asarray(tokens))
    want = forward(settings, weights, tokens)
    assert logits.shape == (1 + depth, 2, 24, 256)
    np.testing.assert_allclose(logits[0], want.logits, atol=2e-4)
    assert (hidden.mtp_routing is None) == (depth == 0)
    for k, own in enumerate(want.mtp, 1):
        assert own.routing.margin.min() > 1e-6
        np.testing.assert_allclose(logits[k, :, : 24 - k], own.logits, atol=3e-4)
        np.testing.assert_allclose(hidden.heads[k, :, : 24 - k], own.head_input, atol=3e-4)


def test_tokens_ahead_are_read_by_mtp_alone():
    """`ahead` gives the same first positions, and a real token instead of zeros at the last."""
    settings, _, model = made(2)
    tokens = jnp.asarray(checkpoints.tokens(settings, length=13))
    short = model.hidden(tokens, Execution(), ahead=1).heads
    whole = model.hidden(tokens, Execution()).heads
    np.testing.assert_allclose(short[0], whole[0, :, :12], atol=2e-5)
    np.testing.assert_allclose(short[1], whole[1, :, :12], atol=2e-5)
    np.testing.assert_allclose(short[2, :, :11], whole[2, :, :11], atol=2e-5)


def test_depth_k_reads_exactly_k_tokens_ahead():
    settings, _, model = made(3)
    tokens = jnp.asarray(checkpoints.tokens(settings, length=16))
    run = jax.jit(lambda t: model.hidden(t, Execution()).heads)
    before, after = run(tokens), run(tokens.at[:, 10].add(1) % 256)
    for k in range(4):
        changed = np.asarray(jnp.abs(after[k] - before[k]).max(-1)) > 0
        assert not changed[:, : 10 - k].any()
        assert changed[:, 10 - k].all()
