"""Parameters: axes and shapes, casting, and different initial weights in each layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from configs import v3_671b
from deepseek_jax import config as configs
from deepseek_jax.config import LOGICAL_AXES
from deepseek_jax.model import params
from deepseek_jax.model.transformer import abstract_model, build_model
from deepseek_jax.precision.fp8_weights import Fp8Weight
from deepseek_jax.precision.recipes import BFLOAT16, FP8


def built(config):
    return jax.jit(lambda key: build_model(config, key))(jax.random.key(0))


def test_every_parameter_of_the_published_model_has_known_axes():
    model = abstract_model(configs.parse(v3_671b.get_config()).model)
    weights = list(params.describe(model))
    assert weights
    for weight in weights:
        assert len(weight.axes) == len(weight.shape), weight.path
        assert {axis for axis in weight.axes if axis} <= set(LOGICAL_AXES), weight.path
        assert weight.dtype == jnp.float32
    untrained = [weight.path for weight in weights if not weight.trained]
    assert untrained == ["moe_layers.feed.router.bias", "mtp.block.feed.router.bias"]


def test_initial_values_have_the_standard_deviation_of_the_config():
    config = small.config(model_init_std=0.05, model_d_dense=256).model
    model = build_model(config, jax.random.key(0))
    for weight, value in zip(params.describe(model), jax.tree.leaves(model), strict=True):
        if weight.path.endswith("scale"):
            np.testing.assert_array_equal(value, 1.0)
        elif weight.path.endswith("bias"):
            np.testing.assert_array_equal(value, 0.0)
        else:
            # Standard error of a standard deviation: std / sqrt(2 n).
            assert float(value.std()) == pytest.approx(0.05, rel=5 / np.sqrt(2 * value.size))


def test_layers_of_a_stack_and_experts_differ():
    model = built(small.config(model_layers=4).model)
    up = np.asarray(model.moe_layers.feed.experts.gate_up[...])  # LED2F
    flat = up.reshape(up.shape[0] * up.shape[1], -1)
    assert len({row.tobytes() for row in flat}) == len(flat)


def test_preparing_leaves_sensitive_weights_alone():
    model = params.prepare(built(small.config().model), BFLOAT16)
    kept = {w.path.rsplit(".", 1)[1] for w in params.describe(model) if w.dtype == jnp.float32}
    assert kept == {"scale", "centroids", "bias"}


def test_place_reaches_every_parameter():
    model = abstract_model(small.config().model)
    placed = params.place(model, lambda axes, shape: (axes, shape))
    leaves = jax.tree.leaves(placed, is_leaf=lambda x: isinstance(x, tuple))
    assert leaves == [(w.axes, w.shape) for w in params.describe(model)]


def test_linear_layers_alone_are_quantised():
    """Every product of the report's section 3.3.1, and not embedding, head, router or norms."""
    model = abstract_model(small.config(model_mtp_depth=1).model)
    weights = params.split(model)[1]
    ready = jax.eval_shape(lambda tree: params.prepare(tree, FP8), weights)
    attention = {"query_down", "query_up", "kv_down", "kv_up", "out"}
    experts = {"experts.gate_up", "experts.down", "shared.gate_up", "shared.down"}
    want = {f"dense_layers.feed.{name}" for name in ("gate_up", "down")} | {"mtp.project"}
    for layer in ("moe_layers", "mtp.block"):
        want |= {f"{layer}.feed.{name}" for name in experts}
    for layer in ("dense_layers", "moe_layers", "mtp.block"):
        want |= {f"{layer}.attention.{name}" for name in attention}
    assert want == {
        ".".join(map(str, path))
        for path, variable in nnx.to_flat_state(ready)
        if isinstance(variable.get_raw_value(), Fp8Weight)
    }
