"""FP8 on several devices: the weights are equal to the bit, losses are near.

Losses are not equal: a device makes tiles of 128 tokens of its own tokens, so that the gradients of
weights are rounded otherwise; and bfloat16 activations differ from the order of sums, where a
near-tie of the router may change hands. In bfloat16 the same layouts differ by 0.4 per cent.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trainer import Trainer, with_schedule

from deepseek_jax.config import MESH_AXES
from deepseek_jax.model import params
from deepseek_jax.model.transformer import build_model
from deepseek_jax.parallel import axes
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.precision import fp8_operands
from deepseek_jax.precision.fp8_weights import Fp8Weight, quantise_blocks
from deepseek_jax.precision.recipes import FP8
from deepseek_jax.train import optimizer, step
from deepseek_jax.train import state as states

# Several blocks along most dimensions, ragged ones, and parts of devices that cut blocks.
RAGGED = dict(
    model_d_model=160, model_d_expert=48, model_d_dense=192, model_d_nope=40, model_d_value=36,
    model_q_latent=136,
)  # fmt: skip
SHARDED = dict(mesh_gpu=2, mesh_tensor=2, layout_zero=3, layout_rules=small.NARROW)
ZERO = dict(mesh_gpu=2, layout_zero=1)
PIPELINE = dict(mesh_pipe=2, mesh_gpu=2, layout_zero=1)


@functools.cache
def drawn(model):
    """Weights of a model."""
    return params.split(build_model(model, jax.random.key(0)))[1]


def prepared(config):
    """The FP8 weights of a step, whole."""
    layout = meshes.layout(config)
    mesh = small.mesh_of({name: getattr(config.mesh, name) for name in MESH_AXES})
    weights = drawn(config.model)
    stored = params.place(weights, layout.storage)

    def local(weights):
        with axes.active(layout):
            ready = params.gather(params.prepare(weights, FP8), layout)
            variables = jax.tree.leaves(ready, is_leaf=params.is_variable)
            return [small.whole_fp8(v, layout) for v in variables if isinstance(v[...], Fp8Weight)]

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(local, mesh=mesh, in_specs=(stored,), out_specs=P(), check_vma=False)
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), stored)
        return jax.jit(mapped)(jax.device_put(weights, places))


def test_weights_of_a_step_do_not_depend_on_the_layout():
    want = prepared(small.config(**RAGGED))
    assert len(want) > 10
    for layout in (
        dict(mesh_gpu=4, mesh_replica=2, layout_zero=3),
        dict(mesh_gpu=2, mesh_tensor=2, mesh_replica=2, layout_zero=1),
    ):
        for ours, theirs in zip(prepared(small.config(**RAGGED, **layout)), want, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def equations(jaxpr, loops=0):
    """Each equation of a program, and the number of loops around it."""
    for equation in jaxpr.eqns:
        yield equation, loops
        inside = loops + (equation.primitive.name in ("while", "scan"))
        parts = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        )
        for part in parts:
            if isinstance(part, ClosedJaxpr | Jaxpr):
                yield from equations(getattr(part, "jaxpr", part), inside)


@pytest.mark.parametrize("layout", [ZERO, PIPELINE], ids=["ZeRO-1", "a pipeline"])
def test_weights_are_quantised_once_a_step_and_gathered_in_fp8(layout, monkeypatch):
    """Outside all loops, such as that over micro-batches; of matrices only routers travel wide."""

    def marked(weight, linear, **rest):
        return quantise_blocks(checkpoint_name(weight, "quantised"), linear, **rest)

    monkeypatch.setattr(fp8_operands, "quantise_blocks", marked)
    config = small.config(
        model_mtp_depth=0, precision_recipe="fp8", batch_micro_sequences=2, **layout
    )
    layout, adam = meshes.layout(config), optimizer.build(config.optimizer)
    mesh = small.mesh_of({name: getattr(config.mesh, name) for name in MESH_AXES})
    start = states.abstract(config, states.shardings(config, layout, mesh, adam), adam)
    rest = step.abstract_arguments(config, layout, mesh)
    with jax.set_mesh(mesh):
        program = jax.make_jaxpr(step.make_step(config, layout, mesh, adam))(start, *rest)
    quantised, gathered = [], collections.Counter()
    for equation, loops in equations(program.jaxpr):
        if equation.params.get("name") == "quantised":
            quantised.append(loops)
        if equation.primitive.name == "all_gather":
            gathered[equation.invars[0].aval.dtype] += equation.invars[0].aval.ndim > 2
    weights = list(params.describe(start.params))
    assert quantised == [0] * sum(weight.roles is not None for weight in weights)
    routers = sum(weight.sensitive and len(weight.shape) > 2 for weight in weights)
    assert gathered[jnp.dtype(jnp.float8_e4m3fn)] > 0
    assert gathered[jnp.dtype(jnp.float32)] == routers


@pytest.mark.parametrize(
    "layout",
    [SHARDED, pytest.param(PIPELINE, marks=pytest.mark.slow)],
    ids=["ZeRO-3 with tensor", "a pipeline"],
)
def test_losses_are_near_those_of_one_device(layout):
    def run(**layout):
        config = small.config(
            model_d_model=160, model_mtp_depth=0, precision_recipe="fp8",
            optimizer_moments="bfloat16", **layout,
        )  # fmt: skip
        config = with_schedule(config, tokens=5000, learning_rate=3e-3, warmup_steps=3)
        return Trainer(config).run(3)

    for ours, theirs in zip(run(**layout), run(), strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=0.01)
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=0.02)
