"""Training of V3.2's indexers: equations 3 and 4, what moves in each phase, and layouts."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from equations import attention, indexer
from equations.norm import part
from flax import nnx
from published import layer, variant
from trainer import Trainer

from deepseek_jax.config import ConfigError
from deepseek_jax.model import params
from deepseek_jax.model.execution import Execution
from deepseek_jax.train import starting
from deepseek_jax.train.index_training import is_of_indexer

PHASES = ("warm_up", "sparse")


@pytest.mark.parametrize("phase", PHASES)
def test_loss_and_output_follow_the_equations(phase):
    """Beyond index_topk positions, in blocks of queries; the last one is shorter."""
    settings, weights, model = variant("v32")
    x = np.random.default_rng(0).normal(size=(2, 40, 48))
    module, how = (
        layer(model.moe_layers, 1).attention,
        Execution(attention_block=16, index_loss=phase),
    )
    run = jax.jit(lambda module, x: module.trained(x, how))
    out, _, loss = run(module, jnp.asarray(x, jnp.float32))

    own, dense = part(weights, "model.layers.2.self_attn"), phase == "warm_up"
    softmax, values = attention.attention_weights(x, own, settings, dense=dense)
    scores = indexer.scores(x, own, settings)
    seen = indexer.selected(scores, 40 if dense else settings["index_topk"])
    want = attention._output(softmax @ values, own)
    np.testing.assert_allclose(out, want, atol=2e-5 * np.abs(want).max())
    np.testing.assert_allclose(loss, indexer.loss(softmax, scores, seen), rtol=2e-5)


def config(phase="sparse", depth=0, **changes):
    return small.config(
        model_mtp_depth=depth,
        batch_length=32,
        layout_attention_block=16,
        **small.indexer(6, index_phase=phase, warmup_steps=1),
        **changes,
    )


@functools.cache
def alone(phase, depth=0):
    """Metrics of three steps on one device, and the weights before and after them."""
    trainer = Trainer(config(phase, depth))
    before = trainer.params()
    return before, trainer.run(3), trainer.params()


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_moves_its_weights_alone(phase):
    before, metrics, after = alone(phase)
    assert 0 < metrics[-1]["index_loss"] < metrics[0]["index_loss"]
    for (path, old), new in zip(
        jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        moved = not np.array_equal(old, new)
        assert moved == (phase == "sparse" or is_of_indexer(path)), jax.tree_util.keystr(path)


@pytest.mark.parametrize("phase", PHASES)
def test_the_losses_are_apart(phase):
    """The indexer's loss has a gradient in its own weights alone, and the output in all others."""
    _, _, model = variant("v32")
    module, how = layer(model.moe_layers).attention, Execution(index_loss=phase)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 30, 48)), jnp.float32)
    graph, weights, _ = params.split(module)

    def both(weights, x):
        out, _, loss = nnx.merge(graph, weights).trained(x, how)
        return jnp.sum(out**2), loss

    of_output, of_loss = jax.jit(jax.jacrev(both, (0, 1)))(weights, x)
    assert np.abs(of_output[1]).max() > 0 and not np.any(of_loss[1])
    for (path, output), loss in zip(
        jax.tree.leaves_with_path(of_output[0]), jax.tree.leaves(of_loss[0]), strict=True
    ):
        own = is_of_indexer(path)
        assert (np.any(output), np.any(loss)) == (not own, own), jax.tree_util.keystr(path)


PIPELINE = dict(mesh_pipe=2, mesh_gpu=2, mesh_tensor=2, layout_zero=1, layout_recompute="full")
LAYOUTS = {
    "ZeRO-3 with tensor ranks": dict(mesh_gpu=2, mesh_tensor=2, layout_zero=3),
}
SLOW = {  # run these with: pytest -m slow tests/train/test_index_training.py
    "a pipeline of tensor ranks": PIPELINE,
    "two in flight": dict(
        mesh_gpu=2, layout_dispatch="flat", layout_micro_batches_in_flight=2, batch_sequences=16
    ),
    "a pipeline, deferred": dict(mesh_pipe=2, layout_defer_weight_gradients=True),
}
CASES = [pytest.param("sparse", 0, layout, id=name) for name, layout in LAYOUTS.items()]
CASES += [
    pytest.param("sparse", 1, layout, id=f"{name}, MTP", marks=pytest.mark.slow)
    for name, layout in (SLOW | LAYOUTS).items()
]
CASES += [pytest.param("warm_up", 1, PIPELINE, id="warm-up, MTP", marks=pytest.mark.slow)]


@pytest.mark.parametrize("phase, depth, layout", CASES)
def test_a_layout_changes_nothing(phase, depth, layout):
    _, want, want_params = alone(phase, depth)
    trainer = Trainer(config(phase, depth, **layout))
    got = trainer.run(3)
    for name in ("loss", "mtp_loss", "index_loss", "grad_norm"):
        np.testing.assert_allclose([m[name] for m in got], [m[name] for m in want], rtol=1e-5)
    small.assert_close(trainer.params(), want_params, rtol=1e-4)


def test_a_warm_up_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"schedule\.index_phase=warm_up trains the indexers"):
        small.config(schedule_index_phase="warm_up")
    with pytest.raises(ConfigError, match=r"model\.q_latent=0"):
        small.config(**small.indexer(6), model_q_latent=0)
    with pytest.raises(ConfigError, match=r"model\.index_width=2 is less than model\.d_rope=4"):
        small.config(model_index_heads=4, model_index_width=2)


@pytest.mark.parametrize("changes, said", [({}, True), ({"schedule_index_weight": 0.0}, False)])
def test_indexers_beside_random_weights_are_warned_of(changes, said):
    """Attention is nearly uniform then, which scores of 0 follow best: they have no gradient."""
    report, store = mock.Mock(), mock.Mock(**{"restore.return_value": None})
    given = small.config(**small.indexer(6) | changes)
    starting.start(given, None, None, store, None, report, fresh=object())
    assert report.say.call_args_list == [mock.call(starting.UNIFORM)] * said
