"""The whole model against a published implementation and against float64."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import checkpoints
from equations import model as reference
from jax.sharding import AxisType, Mesh, NamedSharding

import deepseek_jax
from configs import v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.checkpoint.hf import names
from deepseek_jax.model import execution, rotary
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.params import split
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.precision.recipes import FLOAT32
from deepseek_jax.train import optimizer as optimizers
from deepseek_jax.train.objective import head_weights, objective
from deepseek_jax.train.state import TrainState, shardings
from deepseek_jax.train.step import make_gradients, make_step, tokens_spec
from deepseek_jax.train.token_schedule import Hyper

TINY = Path(__file__).parent / "fixtures" / "hf_tiny"

# Error between independent float32 implementations of this model (the fixture's own).
HIDDEN, WEIGHTS, LOSS, GRADIENT, STEPS = 2e-4, 2e-5, 1e-5, 1e-4, 1e-4


@pytest.fixture(scope="module")
def expected():
    with np.load(TINY / "expected.npz") as values:
        return dict(values)


@pytest.fixture(scope="module")
def tiny():
    return deepseek_jax.load(TINY)


@pytest.fixture(scope="module")
def out(tiny, expected):
    return tiny(expected["input_ids"])


def assert_near(got, want, tolerance):
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=tolerance)


def by_expert(routing):
    """(experts, weights) of each token, ordered by expert."""
    order = np.argsort(routing.experts, axis=-1)
    pair = (np.asarray(routing.experts), np.asarray(routing.weights))
    return tuple(np.take_along_axis(part, order, -1) for part in pair)


@pytest.mark.smoke
def test_logits_and_loss(tiny, out, expected):
    assert out.logits.dtype == jnp.float32
    assert_near(out.logits, expected["logits"], HIDDEN)
    assert_near(out.hidden, expected["final_norm"], HIDDEN)
    assert_near(tiny.loss(expected["input_ids"]), expected["loss"], LOSS)


def test_routing(out, expected):
    assert sorted(out.routing) == [1, 2, 3] and out.mtp_logits == ()
    for layer, routing in out.routing.items():
        assert routing.experts.dtype == jnp.int32 and routing.weights.dtype == jnp.float32
        experts, weights = by_expert(routing)
        np.testing.assert_array_equal(experts, expected[f"topk_indices_{layer}"])
        assert_near(weights, expected[f"topk_weights_{layer}"], WEIGHTS)


def test_every_layer(tiny, expected):
    """Embeddings, each layer's attention and output, and the router's logits."""

    @jax.jit
    def walk(model, tokens):
        how = Execution()
        x = model.embedding(tokens, how)
        found = {"hidden_0": x}
        for layer in range(model.config.layers):
            dense = layer < model.config.dense_layers
            stack = model.dense_layers if dense else model.moe_layers
            place = layer if dense else layer - model.config.dense_layers
            block = jax.tree.map(lambda leaf, place=place: leaf[place], stack)
            attended = block.attention(block.attention_norm(x), how)
            found[f"attn_out_{layer}"] = attended
            if not dense:
                entered = block.feed_norm(x + attended)
                centroids = block.feed.router.centroids[...]
                logits = FLOAT32.einsum("BSD,DE->BSE", entered, centroids)
                found[f"router_logits_{layer}"] = logits
            x, *_ = block(x, how)
            found[f"hidden_{layer + 1}"] = x
        return found

    found = walk(tiny.weights, expected["input_ids"])
    assert len(found) == 1 + 2 * 4 + 3
    for name, value in found.items():
        assert_near(value, expected[name], HIDDEN)


@pytest.mark.smoke
def test_greedy_generation(tiny, expected):
    """24 tokens, each from the whole text so far: causal, so what stands behind it is free."""
    prompt, steps = expected["gen_prompt"], expected["gen_tokens"].shape[1]
    text = np.zeros_like(expected["input_ids"])  # one shape, one program
    text[:, : prompt.shape[1]] = prompt
    for step in range(steps):
        end = prompt.shape[1] + step
        logits = np.asarray(tiny(text).logits[:, end - 1])
        assert_near(logits, expected["gen_step_logits"][:, step], HIDDEN)
        text[:, end] = logits.argmax(-1)
    np.testing.assert_array_equal(text[:, prompt.shape[1] : end + 1], expected["gen_tokens"])


def test_rotary(tiny, expected):
    config = tiny.config
    assert_near(rotary.frequencies(config), expected["rope_inv_freq"], 1e-7)
    assert_near(rotary.softmax_scale(config), expected["softmax_scale"], 1e-7)
    cos, _ = rotary.cos_sin(config, jnp.arange(1))
    assert_near(cos, expected["rope_attention_scaling"], 1e-7)


def test_both_spellings_of_the_settings(tmp_path, tiny):
    shutil.copy(TINY / "config.hf5.json", tmp_path / "config.json")
    shutil.copy(TINY / "model.safetensors", tmp_path)
    other = deepseek_jax.load(tmp_path)
    assert other.config == dataclasses.replace(tiny.config, yarn_original=256)
    assert jax.tree.structure(other.weights) == jax.tree.structure(tiny.weights)
    jax.tree.map(np.testing.assert_array_equal, other.weights, tiny.weights)


@pytest.fixture(scope="module")
def training(tiny, expected):
    """(config, layout, mesh, parameters, biases, tokens) of a step on the fixture's batch."""
    config = v3_tiny.get_config()
    config.optimizer.update(decayed="all", ema_decay=0.0, moments="float32")
    config.schedule.balance_alpha = 0.0
    config.layout.unroll = 1
    config.mesh.gpu = 1
    count, length = expected["input_ids"].shape
    config.batch.update(
        length=length - 1, sequences=count, ramp_sequences=count, micro_sequences=count
    )
    config = dataclasses.replace(configs.parse(config), model=tiny.config)
    shape = (1,) * len(configs.MESH_AXES)
    devices = np.array(jax.devices()[:1]).reshape(shape)
    mesh = Mesh(devices, configs.MESH_AXES, axis_types=(AxisType.Explicit,) * len(shape))
    layout = meshes.layout(config)
    _, params, bias = split(tiny.weights)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, tokens_spec(layout))
        tokens = jax.device_put(expected["input_ids"][None], place)
    return config, layout, mesh, params, bias, tokens


def test_gradients(training, tiny, expected):
    config, layout, mesh, params, bias, tokens = training
    with jax.set_mesh(mesh):
        gradients = jax.jit(make_gradients(config, layout, mesh))
        found, sums = gradients(params, bias, tokens, jnp.int32(1), jnp.float32(0))
    assert_near(sums.entropy[0] / tokens[..., 1:].size, expected["loss"], LOSS)
    named = names.to_published(tiny.config, found)
    wanted = {k.removeprefix("grad:"): v for k, v in expected.items() if k.startswith("grad:")}
    assert len(wanted) == 9 and wanted.keys() <= named.keys()  # the norm below covers the others
    for name, want in wanted.items():
        assert named[name].shape == want.shape, name
        assert_near(named[name], want, GRADIENT * max(np.abs(want).max(), 1e-12))
    norm = np.sqrt(sum(np.square(value.astype(np.float64)).sum() for value in named.values()))
    np.testing.assert_allclose(norm, expected["grad_global_norm"], rtol=GRADIENT)


def test_five_optimiser_steps(training, expected):
    config, layout, mesh, params, bias, tokens = training
    optimizer = optimizers.build(config.optimizer)
    hyper = Hyper(np.float32(1e-3), np.float32(0), np.float32(0))
    losses = []
    with jax.set_mesh(mesh):
        step = jax.jit(make_step(config, layout, mesh, optimizer))
        state = TrainState(jnp.int32(0), params, bias, optimizer.init(params), None)
        state = jax.device_put(state, shardings(config, layout, mesh, optimizer))
        for _ in expected["adamw_losses"]:
            state, metrics = step(state, tokens, jnp.int32(1), hyper)
            losses.append(float(metrics["loss"]))
    assert_near(losses, expected["adamw_losses"], STEPS)
    assert losses[-1] < losses[0] - 0.1


@functools.cache
def case(variant):
    """(settings, weights, tokens, float64 forward pass) of a generated checkpoint."""
    settings, weights = checkpoints.make(variant, seed=2)
    tokens = checkpoints.tokens(settings, seed=2)
    return settings, weights, tokens, reference.forward(settings, weights, tokens)


@pytest.mark.parametrize("variant", checkpoints.VARIANTS)
def test_every_rule_that_models_differ_in(variant, tmp_path):
    settings, weights, tokens, want = case(variant)
    checkpoints.write(tmp_path / "one", settings, weights)
    model = deepseek_jax.load(tmp_path / "one")
    got = model(tokens)
    assert_near(got.logits, want.logits, HIDDEN)
    assert_near(got.hidden, want.final_norm, HIDDEN)
    assert len(got.mtp_logits) == settings["num_nextn_predict_layers"] == len(want.mtp)
    routed = dict(want.routing)
    for k, depth in enumerate(want.mtp):
        assert_near(got.mtp_logits[k][:, : -k - 1], depth.logits, HIDDEN)
        routed[settings["num_hidden_layers"] + k] = depth.routing
    assert got.routing.keys() == routed.keys()
    for layer, routing in routed.items():
        length = routing.experts.shape[1]
        experts, gates = by_expert(jax.tree.map(np.asarray, got.routing[layer]))
        np.testing.assert_array_equal(experts[:, :length], routing.experts)
        # Relative to the routed scale, which is 16 in one variant.
        assert_near(gates[:, :length] / model.config.routed_scale,
             routing.weights / model.config.routed_scale, WEIGHTS)  # fmt: skip

    checkpoints.write(tmp_path / "many", settings, weights, shards=3)
    sharded = deepseek_jax.load(tmp_path / "many")
    assert sharded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, sharded.weights, model.weights)


@pytest.mark.parametrize("variant", ["mtp", "mtp2"])
def test_losses_of_every_depth(variant, tmp_path):
    """Losses through the objective that training minimises."""
    settings, weights, tokens, want = case(variant)
    checkpoints.write(tmp_path, settings, weights)
    model = deepseek_jax.load(tmp_path).weights
    count, length = tokens.shape
    how = execution.Execution()

    @jax.jit
    def losses(model, tokens):
        return objective(
            model, tokens, how=how, chunk=64, mtp_weight=0.3, alpha=0.0, sequences=float(count)
        )

    loss, sums = losses(model, tokens)
    depth = settings["num_nextn_predict_layers"]
    valid = np.asarray(head_weights(depth, length - 1, 1.0) > 0).sum(1)
    assert_near(sums.entropy / (count * valid), [want.loss, *want.mtp_losses], LOSS)
    assert_near(loss, want.loss + 0.3 * np.mean(want.mtp_losses), LOSS)


def test_bfloat16_is_near_float32(tiny):
    """Eight bits of mantissa, four layers: about 2 per cent of the logits' spread, 2.07.

    That is so where no choice of experts differs. Near-ties of the router do change hands, one in
    twenty, and a token that went to another expert is another number to all tokens after it.
    """
    model = deepseek_jax.load(TINY, dtype=jnp.bfloat16)
    assert model.weights.head.table[...].dtype == jnp.bfloat16
    assert model.weights.norm.scale[...].dtype == jnp.float32
    tokens = np.random.default_rng(0).integers(0, tiny.config.vocab, (16, 64))
    want, got = tiny(tokens), model(tokens)
    assert got.logits.dtype == jnp.float32 and got.hidden.dtype == jnp.bfloat16
    layers = [(by_expert(got.routing[i])[0], by_expert(want.routing[i])[0]) for i in want.routing]
    other = np.array([(ours != theirs).any(-1) for ours, theirs in layers])  # layer, B, S
    assert other.mean() < 0.07
    same = np.cumsum(other.any(0), axis=1) == 0  # attention is causal
    assert same.sum() > 150
    difference = np.asarray(got.logits - want.logits)[same]
    assert 1e-4 < np.sqrt(np.mean(difference**2)) < 0.05


def test_settings_of_a_published_model_are_read(tmp_path):
    """The same checkpoint as `transformers` writes a YaRN model: `rope_parameters`."""
    settings, weights, tokens, want = case("yarn")
    yarn = {**settings["rope_scaling"], "rope_type": "yarn", "rope_theta": settings["rope_theta"]}
    newer = {
        key: value for key, value in settings.items() if key not in ("rope_scaling", "rope_theta")
    }
    del yarn["type"]
    checkpoints.write(tmp_path / "new", {**newer, "rope_parameters": yarn}, weights)
    checkpoints.write(tmp_path / "old", settings, weights)
    model = deepseek_jax.load(tmp_path / "new")
    assert model.config == deepseek_jax.load(tmp_path / "old").config
    assert model.config.yarn_factor == json.loads((tmp_path / "old" / "config.json").read_text())[
        "rope_scaling"]["factor"]  # fmt: skip
    assert_near(model(tokens).logits, want.logits, HIDDEN)
