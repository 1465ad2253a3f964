"""AdamW against the equations: clipping, decayed weights, moments in bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from equations import recipe

from deepseek_jax.model import params
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.train import optimizer

RATE = 0.01
SHAPES = {"table": (6, 5), "scale": (7,)}


def settings(**changes):
    return dataclasses.replace(small.config().optimizer, **changes)


def drawn(seed, size=1.0):
    rng = np.random.default_rng(seed)
    return {name: (size * rng.normal(size=s)).astype(np.float32) for name, s in SHAPES.items()}


def walked(config, size):
    """Parameters and Adam's state after five steps whose gradients have about this size."""
    build = optimizer.build(config)
    parameters = jax.tree.map(jnp.asarray, drawn(0))
    opt_state = build.init(parameters)

    @jax.jit
    def move(parameters, opt_state, gradients):
        updates, opt_state = build.update(gradients, opt_state, parameters)
        return jax.tree.map(lambda p, u: p - RATE * u, parameters, updates), opt_state

    for step in range(1, 6):
        parameters, opt_state = move(parameters, opt_state, drawn(step, size))
    adam = next(part for part in opt_state if isinstance(part, optax.ScaleByAdamState))
    return parameters, adam


def expected(config, size):
    parameters = {name: value.astype(float) for name, value in drawn(0).items()}
    m = v = {name: np.zeros_like(value) for name, value in parameters.items()}
    decay = dict.fromkeys(("table", "scale"), config.weight_decay)
    if config.decayed == "matrices":
        del decay["scale"]
    kept = jnp.dtype(config.moments)
    for step in range(1, 6):
        parameters, m, v = recipe.adamw(
            parameters, recipe.clip(drawn(step, size), config.clip), m, v, step, RATE,
            b1=config.b1, b2=config.b2, eps=config.eps, decay=decay,
        )  # fmt: skip
        m, v = ({n: x.astype(kept).astype(float) for n, x in part.items()} for part in (m, v))
    return parameters, m, v


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("decayed", ["matrices", "all"])
@pytest.mark.parametrize("size", [1.0, 0.01], ids=["clipped", "not clipped"])
def test_five_steps_follow_the_equations(size, decayed, moments):
    config = settings(weight_decay=0.5, decayed=decayed, moments=moments)
    assert all((recipe.global_norm(drawn(s, size)) > config.clip) == (size == 1) for s in range(6))
    parameters, adam = walked(config, size)
    want, m, v = expected(config, size)
    small.assert_close(parameters, want, rtol=1e-6)
    small.assert_close(adam.mu, m, rtol=1e-6)
    small.assert_close(adam.nu, v, rtol=1e-6)
    for moment in jax.tree.leaves((adam.mu, adam.nu)):
        assert moment.dtype == moments
    assert int(adam.count) == 5


def test_clipping_keeps_directions_and_takes_the_norm_over_everything():
    """Adam forgets one common factor, so clipping shows where it differs between steps."""
    loose, tight = (walked(settings(clip=clip), 1.0)[1].mu for clip in (1e9, 1e-3))
    assert optax.global_norm(tight) <= 1e-3
    assert optax.global_norm(loose) > 1


@pytest.mark.parametrize("decayed", ["matrices", "all"])
def test_of_the_model_norm_scales_alone_are_spared(decayed):
    _, parameters, _ = params.split(abstract_model(small.config().model))
    mask = optimizer.decay_mask(decayed)
    if decayed == "all":
        assert mask is None  # optax decays everything
        return
    spared = {
        jax.tree_util.keystr(path)
        for path, decays in jax.tree_util.tree_leaves_with_path(mask(parameters))
        if not decays
    }
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(parameters)]
    assert spared == {path for path in paths if "norm" in path}
    assert spared and len(spared) < len(paths)
