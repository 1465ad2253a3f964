"""One optimiser step: accumulation, router bias, metrics, EMA, masters in float32."""

import chex
import jax
import numpy as np
import pytest
import small
from equations import recipe
from trainer import Trainer

from deepseek_jax.train import optimizer, token_schedule
from deepseek_jax.train import state as states
from deepseek_jax.train.objective import head_weights
from deepseek_jax.train.step import make_ema

HYPER = token_schedule.Hyper(learning_rate=1e-2, mtp_weight=0.3, bias_speed=0.01)


def drawn(micro_batches, sequences, length=16, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 64, (micro_batches, sequences, length + 1), np.int32)


@pytest.fixture(scope="module")
def split_and_whole():
    """The same sixteen sequences as two micro-batches of eight, and as one of sixteen."""
    two = Trainer(small.config(mesh_gpu=2))
    one = Trainer(small.config(mesh_gpu=2, batch_micro_sequences=16, batch_ramp_sequences=16))
    tokens = drawn(2, 8)
    # Rows of a micro-batch are split over devices, so each device must get the same sequences.
    whole = np.concatenate([tokens[:, :4].reshape(8, -1), tokens[:, 4:].reshape(8, -1)])[None]
    return (two, two.step(tokens, 2, HYPER)), (one, one.step(whole, 1, HYPER))


def test_accumulation_is_one_large_batch(split_and_whole):
    (two, split), (one, whole) = split_and_whole
    for name in ("loss", "mtp_losses", "balance_loss", "grad_norm"):
        np.testing.assert_allclose(split[name], whole[name], rtol=2e-6)
    np.testing.assert_array_equal(split["expert_load"], whole["expert_load"])
    # Adam's first moment is the clipped gradient times 1 - b1.
    small.assert_close(first_moment(two), first_moment(one), rtol=1e-5)


def first_moment(trainer):
    adam = next(part for part in trainer.state.opt_state if hasattr(part, "mu"))
    return jax.device_get(adam.mu)


def test_bias_moves_by_the_load_of_the_whole_step(split_and_whole):
    (two, metrics), _ = split_and_whole
    loads = metrics["expert_load"]  # a MoE layer, a MTP block
    assert loads.shape == (2, 8)
    moved = jax.tree.leaves(jax.device_get(two.state.bias))
    want = [recipe_bias(rows) for rows in (loads[:1], loads[1:])]
    for got, expected in zip(moved, want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-9)


def recipe_bias(loads):
    from equations.router import move_bias

    return np.stack([move_bias(np.zeros(8), load, 0.01) for load in loads])


def test_a_short_step_leaves_the_rest_of_its_micro_batches_alone():
    trainer = Trainer(small.config(model_mtp_depth=0))
    tokens = drawn(2, 8)
    garbage = tokens.copy()
    garbage[1] = 0
    start = jax.tree.map(np.copy, jax.device_get(trainer.state))
    first = trainer.step(tokens, 1, HYPER)
    kept = trainer.params()
    with jax.set_mesh(trainer.mesh):
        places = jax.tree.map(lambda x: x.sharding, trainer.state)
        trainer.state = jax.device_put(start, places)
    again = trainer.step(garbage, 1, HYPER)
    assert first["loss"] == again["loss"]
    chex.assert_trees_all_equal(kept, trainer.params())


def test_mtp_weights_are_means_over_the_valid_targets():
    weights = np.asarray(head_weights(2, 10, 0.3))
    np.testing.assert_allclose(weights.sum(1), [1.0, 0.15, 0.15], rtol=1e-6)
    assert [int((row > 0).sum()) for row in weights] == [10, 9, 8]
    assert np.asarray(head_weights(0, 4, 0.3)).tolist() == [[0.25] * 4]


@pytest.mark.parametrize("sizes", [{}, {"replica": 2, "gpu": 2}], ids=str)
def test_ema_follows_in_host_memory(sizes):
    mesh = {f"mesh_{name}": size for name, size in sizes.items()}
    config = small.config(model_mtp_depth=0, optimizer_ema_decay=0.9, layout_zero=1, **mesh)
    trainer = Trainer(config)
    adam = optimizer.build(config.optimizer)
    with jax.set_mesh(trainer.mesh):
        places = states.shardings(config, trainer.layout, trainer.mesh, adam)
        move = make_ema(config, places)
        average = first = trainer.state.ema
        want = jax.tree.leaves(jax.device_get(average))
        for number in range(3):
            grown = jax.tree.map(lambda x, n=number: x + n, trainer.state.params)
            average = move(average, grown)
            new = [np.float64(leaf) + number for leaf in jax.tree.leaves(trainer.params())]
            want = recipe.ema(dict(enumerate(want)), dict(enumerate(new)), 0.9).values()
    # A checkpoint may still read the donated state.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(average)}
    assert kinds == {states.host_memory()}
    for got, expected in zip(jax.tree.leaves(jax.device_get(average)), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_masters_stay_float32_in_bfloat16():
    bfloat16 = dict(precision_recipe="bfloat16", optimizer_moments="bfloat16")
    trainer = Trainer(small.config(model_mtp_depth=0, mesh_gpu=2, **bfloat16))
    metrics = [trainer.step(drawn(2, 8), 2, HYPER) for _ in range(8)]
    assert {str(x.dtype) for x in jax.tree.leaves(trainer.state.params)} == {"float32"}
    want = Trainer(small.config(model_mtp_depth=0)).step(drawn(2, 8), 2, HYPER)
    np.testing.assert_allclose(metrics[0]["loss"], want["loss"], rtol=2e-3)  # 8 bits of mantissa
    assert metrics[-1]["loss"] < metrics[0]["loss"]
