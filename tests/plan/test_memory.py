"""Estimated bytes equal those of a real state and real gradients on every device."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from configs import v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.model import least_memory, params
from deepseek_jax.model.overlapped import stage_params
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.pipeline.executor import Pipeline
from deepseek_jax.parallel.pipeline.one_f_one_b import OneFOneB
from deepseek_jax.plan.memory import memory
from deepseek_jax.precision.recipes import recipe
from deepseek_jax.train import optimizer, state
from deepseek_jax.train.step import make_gradients, tokens_spec

BUILT = "zero1 bf16 moments, by a program"  # weights drawn by the program of a real run
LAYOUTS = {
    "zero0": dict(zero=0, replica=2, node=2, gpu=2, tensor=1),
    "zero1": dict(zero=1, replica=1, node=2, gpu=4, tensor=1),
    "zero1 bf16 moments": dict(zero=1, replica=2, node=1, gpu=4, tensor=1, moments="bfloat16"),
    BUILT: dict(zero=1, replica=2, node=1, gpu=4, tensor=1, moments="bfloat16"),
    "zero3 bf16": dict(zero=3, replica=2, node=2, gpu=2, tensor=1, recipe="bfloat16"),
    "zero3 tensor, no EMA": dict(zero=3, replica=1, node=2, gpu=2, tensor=2, ema=0.0),
    "zero1 tensor bf16": dict(zero=1, replica=2, node=1, gpu=2, tensor=2, recipe="bfloat16"),
    "zero1 tensor, Muon": dict(zero=1, replica=2, node=1, gpu=2, tensor=2, optimizer="muon"),
    "zero0 bf16": dict(zero=0, replica=1, node=1, gpu=8, tensor=1, recipe="bfloat16"),
}


def some_slow(names, *slow):
    """Parameters of a test, of which some run with the slow tests."""
    return [pytest.param(n, marks=[pytest.mark.slow] if n in slow else []) for n in names]


def small(
    zero, replica, node, gpu, tensor, moments="float32", ema=0.9, recipe="float32", pipe=1,
    optimizer="adamw", **layout
):  # fmt: skip
    config = v3_tiny.get_config()
    config.model.update(layers=3, vocab=264, d_model=64, d_dense=72, experts=8, d_expert=12)
    config.mesh.update(pipe=pipe, replica=replica, node=node, gpu=gpu, tensor=tensor)
    config.layout.update(zero=zero, **layout)
    config.precision.recipe = recipe
    config.optimizer.update(moments=moments, ema_decay=ema, name=optimizer)
    return configs.parse(config)


def bytes_on_each_device(tree):
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return list(held.values())


def moments_of(opt_state):
    """Momentum of Muon, and both moments of Adam."""
    parts = jax.tree.leaves(opt_state, is_leaf=lambda part: hasattr(part, "mu"))
    parts = [part for part in parts if hasattr(part, "mu")]
    return [part.mu for part in parts], [part.nu for part in parts if hasattr(part, "nu")]


@pytest.mark.parametrize("name", some_slow(LAYOUTS, BUILT))
def test_predicted_bytes_are_what_is_allocated(name):
    config = small(**LAYOUTS[name])
    got, mesh, layout = memory(config), meshes.build(config.mesh), meshes.layout(config)
    adam = optimizer.build(config.optimizer)
    with jax.set_mesh(mesh):
        places = state.shardings(config, layout, mesh, adam)
        if name == BUILT:
            real = state.initialise(config, places, adam)
        else:  # what a checkpoint is restored into, without compiling
            shapes = state.abstract(config, places, adam)
            real = jax.tree.map(
                lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), shapes
            )
        keep = layout.storage if layout.zero == 3 else lambda axes, _: layout.spec(axes)
        places = params.place(real.params, lambda *where: NamedSharding(mesh, keep(*where)))
        prepared = params.prepare(real.params, recipe(config.precision.recipe))
        compute = jax.device_put(prepared, places)
        sums = jax.device_put(real.params, places)
    each = {
        "masters": real.params,
        "router_bias": real.bias,
        "gradients": sums,
        "ema_host": real.ema,
        "state": dataclasses.replace(real, ema=None),
        "moments": moments_of(real.opt_state),
    }
    for key, tree in each.items():
        assert bytes_on_each_device(tree) == [getattr(got, key)] * 8, key
    least = least_memory.state(config, layout).bytes
    assert least == got.masters + got.router_bias + got.moments + got.masters  # and gradients
    masters = jax.tree.leaves(real.params)
    copies = [
        new
        for old, new in zip(masters, jax.tree.leaves(compute), strict=True)
        if not old.sharding.is_equivalent_to(new.sharding, old.ndim) or old.dtype != new.dtype
    ]
    assert bytes_on_each_device(copies) == [got.compute_weights] * 8
    scattered = [
        old
        for old, new in zip(masters, jax.tree.leaves(sums), strict=True)
        if not old.sharding.is_equivalent_to(new.sharding, old.ndim)
    ]
    assert bytes_on_each_device(scattered) == [got.reduced_gradients] * 8


PIPELINES = {
    "2 ranks": dict(zero=1, pipe=2, replica=1, node=2, gpu=2, tensor=1),
    "2 ranks, V, bf16": dict(
        zero=1, pipe=2, replica=2, node=1, gpu=2, tensor=1, pipeline="dualpipev", recipe="bfloat16",
        moments="bfloat16",
    ),
    "4 ranks, V, given layers": dict(
        zero=1, pipe=4, replica=1, node=1, gpu=1, tensor=2, pipeline="dualpipev",
        stage_layers=(1, 1, 0, 1, 0, 0, 0, 0),
    ),
    "2 ranks, 1F1B": dict(
        zero=1, pipe=2, replica=1, node=2, gpu=2, tensor=1, pipeline="1f1b", stage_layers=(2, 1),
    ),
    "4 ranks, whole masters": dict(zero=0, pipe=4, replica=2, node=1, gpu=1, tensor=1),
}  # fmt: skip


def local_leaves(tree):
    """path -> (local shape, dtype) of what a traced program holds on a device."""
    names = [weight.path for weight in params.describe(tree)]
    leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    return dict(zip(names, leaves, strict=True))


def held(leaves):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("name", some_slow(PIPELINES, "2 ranks", "4 ranks, whole masters"))
def test_a_pipeline_s_bytes_are_those_of_its_program(name, monkeypatch):
    """State as allocated; weights and gradients as the step returns them, traced."""
    config = small(**PIPELINES[name])
    got, mesh, layout = memory(config), meshes.build(config.mesh), meshes.layout(config)
    seen = {}

    def watch(owner, attribute, note):
        function = getattr(owner, attribute)

        def watched(*arguments, **options):
            out = function(*arguments, **options)
            seen[attribute] = note(arguments, out)
            return out

        monkeypatch.setattr(owner, attribute, watched)

    watch(stage_params, "fetch_stage_params", lambda _, out: jax.tree.leaves(out))
    watch(params, "gather", lambda before, out: (local_leaves(before[0]), local_leaves(out)))
    for executor in (Pipeline, OneFOneB):
        watch(executor, "run", lambda _, out: jax.tree.leaves((out[0], out[2][0])))
    watch(stage_params, "return_gradients", lambda _, out: local_leaves(out))
    adam, batch = optimizer.build(config.optimizer), config.batch
    with jax.set_mesh(mesh):
        shapes = state.abstract(config, state.shardings(config, layout, mesh, adam), adam)
        real = jax.tree.map(
            lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), shapes
        )
        tokens = jax.ShapeDtypeStruct(
            (4, batch.micro_sequences, batch.length + 1), np.int32,
            sharding=NamedSharding(mesh, tokens_spec(layout)),
        )  # fmt: skip
        step = make_gradients(config, layout, mesh)
        scalars = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((), np.float32)
        jax.eval_shape(step, shapes.params, shapes.bias, tokens, *scalars)
    each = {
        "masters": real.params,
        "router_bias": real.bias,
        "ema_host": real.ema,
        "state": dataclasses.replace(real, ema=None),
        "moments": moments_of(real.opt_state),
    }
    for key, tree in each.items():
        assert bytes_on_each_device(tree) == [getattr(got, key)] * 8, key
    before, ends = seen["gather"]
    copies = [
        leaf
        for path, leaf in ends.items()
        if leaf.shape != before[path].shape or leaf.dtype != np.float32
    ]
    assert held(seen["fetch_stage_params"]) + held(copies) == got.compute_weights
    assert held(seen["run"]) == got.gradients
    home = [
        leaf
        for path, leaf in seen["return_gradients"].items()
        if path not in ends or leaf.shape != ends[path].shape
    ]
    assert held(home) == got.reduced_gradients
    assert got.gathered_layer == 0


def test_a_pipeline_splits_masters_and_computes_with_whole_slots():
    """Layers 0, 1 | 2, nothing: each of two ranks has four slots, where the model has 3 layers."""
    flat = memory(small(zero=1, replica=1, node=2, gpu=2, tensor=1, recipe="bfloat16"))
    piped = memory(small(zero=1, pipe=2, replica=1, node=2, gpu=2, tensor=1, recipe="bfloat16"))
    assert piped.masters == flat.masters / 2 and piped.moments == flat.moments / 2
    assert piped.compute_weights > flat.compute_weights and piped.gradients > flat.gradients


@pytest.mark.parametrize("pipe", [3, 7])
def test_ranks_that_dualpipe_cannot_pair(pipe):
    config = small(**LAYOUTS["zero1"])
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, pipe=pipe))
    with pytest.raises(configs.ConfigError, match=f"mesh.pipe={pipe}"):
        memory(config)


@pytest.mark.parametrize("pipeline", ["dualpipe", "dualpipev", "1f1b"])
def test_absurd_sizes_are_planned_at_once(pipeline):
    config = small(**PIPELINES["2 ranks"], pipeline=pipeline)
    model = dataclasses.replace(config.model, layers=2**31)
    planned = memory(dataclasses.replace(config, model=model))
    assert planned.masters > 2**31 * 4 * config.model.d_model
