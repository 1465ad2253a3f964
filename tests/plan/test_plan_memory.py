"""Predicted bytes are those that a real state and real gradients take on every device."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from configs import v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.model import params
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.plan.memory import memory, stages
from deepseek_jax.precision.matmul import recipe
from deepseek_jax.train import optimizer, state

LAYOUTS = {
    "zero0": dict(zero=0, replica=2, node=2, gpu=2, tensor=1),
    "zero1": dict(zero=1, replica=1, node=2, gpu=4, tensor=1),
    "zero1 bf16 moments": dict(zero=1, replica=2, node=1, gpu=4, tensor=1, moments="bfloat16"),
    "zero3 bf16": dict(zero=3, replica=2, node=2, gpu=2, tensor=1, recipe="bfloat16"),
    "zero3 tensor, no EMA": dict(zero=3, replica=1, node=2, gpu=2, tensor=2, ema=0.0),
    "zero1 tensor bf16": dict(zero=1, replica=2, node=1, gpu=2, tensor=2, recipe="bfloat16"),
    "zero0 bf16": dict(zero=0, replica=1, node=1, gpu=8, tensor=1, recipe="bfloat16"),
}

BUILT = "zero1 bf16 moments"  # the one whose weights are drawn by the program of a real run


def small(zero, replica, node, gpu, tensor, moments="float32", ema=0.9, recipe="float32"):
    config = v3_tiny.get_config()
    config.model.update(layers=3, vocab=264, d_model=64, d_dense=72, experts=8, d_expert=12)
    config.mesh.update(replica=replica, node=node, gpu=gpu, tensor=tensor)
    config.layout.zero, config.precision.recipe = zero, recipe
    config.optimizer.update(moments=moments, ema_decay=ema)
    return configs.parse(config)


def bytes_on_each_device(tree):
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return list(held.values())


@pytest.mark.parametrize("name", LAYOUTS)
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
        dtype = recipe(config.precision.recipe).compute
        keep = layout.storage if layout.zero == 3 else lambda axes, _: layout.spec(axes)
        places = params.place(real.params, lambda *where: NamedSharding(mesh, keep(*where)))
        compute = jax.device_put(params.cast(real.params, dtype), places)
        sums = jax.device_put(real.params, places)
    each = {
        "masters": real.params,
        "router_bias": real.bias,
        "gradients": sums,
        "ema_host": real.ema,
        "state": dataclasses.replace(real, ema=None),
        "moments": next(part for part in real.opt_state if hasattr(part, "mu"))[1:],
    }
    for key, tree in each.items():
        assert bytes_on_each_device(tree) == [getattr(got, key)] * 8, key
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


@pytest.mark.parametrize(("layers", "parts"), [(61, 16), (4, 4), (7, 2)])
def test_stages_hold_every_layer_once_and_differ_by_one_at_most(layers, parts):
    held = stages(layers, parts)
    assert [layer for stage in held for layer in stage] == list(range(layers))
    assert len(held) == parts
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_two_stages_on_two_ranks_are_the_whole_model_each():
    config = small(**LAYOUTS["zero1"])
    piped = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, pipe=2))
    assert memory(piped) == memory(config)


@pytest.mark.parametrize("pipe", [3, 64])
def test_stages_that_dualpipe_cannot_pair(pipe):
    config = small(**LAYOUTS["zero1"])
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, pipe=pipe))
    with pytest.raises(configs.ConfigError, match=f"mesh.pipe={pipe}"):
        memory(config)
