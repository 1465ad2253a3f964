"""Residuals of a layer, traced: the shapes of the arrays that it keeps for backward.

A layer is traced as one device of the config's mesh runs it; nothing is compiled or allocated, and
no device is needed. A trace takes seconds. `activations.py` has the same bytes in closed form.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import DATA_AXES, MESH_AXES, Config
from deepseek_jax.model import execution, params
from deepseek_jax.model.block import Block
from deepseek_jax.model.overlapped.layer_modules import block_modules, layer_weights
from deepseek_jax.model.overlapped.layer_pass import LayerPass
from deepseek_jax.parallel import axes
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.overlap import run_to_end

Leaf = jax.ShapeDtypeStruct


def nbytes(leaf: Any) -> int:
    """Bytes of an array with a shape and a dtype."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def of_layer_pass(config: Config) -> list[Leaf]:
    """Arrays that an MoE layer of a pipeline stage keeps of one micro-batch, besides its weights.

    Args:
      config: Config of the run, whose mesh has no -1.

    Returns:
      Shapes and dtypes on one device.
    """
    how = dataclasses.replace(execution.of(config), in_flight=1)

    def residuals(block: Any, x: jax.Array) -> Any:
        return _forward(_layer_pass(config, how, block), x)[2].leaves

    return jax.tree.leaves(_on_a_device(config, how, residuals, dense=False))


def of_deferred(config: Config) -> list[Leaf]:
    """Arrays that an MoE layer keeps of one micro-batch for weight gradients that it defers.

    Args:
      config: Config of the run, whose mesh has no -1.
    """
    how = dataclasses.replace(execution.of(config), in_flight=1)

    def deferred(block: Any, x: jax.Array) -> Any:
        layer = _layer_pass(config, how, block)
        out, _, residuals = _forward(layer, x)
        backward = layer.backward(residuals, out, layer.routing_gradient(x, jnp.float32(0)))
        run_to_end(backward.steps(shared=True))
        return backward.deferred().leaves

    return jax.tree.leaves(_on_a_device(config, how, deferred, dense=False))


def _layer_pass(config: Config, how: execution.Execution, block: Any) -> LayerPass:
    return LayerPass(
        how,
        config.model.experts,
        layer_weights(block_modules(block)),
        defer=config.layout.defer_weight_gradients,
        recompute_all=how.remat.recompute_all,
        resend=how.remat.resend,
    )


def _forward(layer: LayerPass, x: jax.Array) -> Any:
    forward = layer.forward(x)
    run_to_end(forward.steps(shared=True))
    return forward.result()


def of_block(config: Config, *, dense: bool) -> list[Leaf]:
    """Arrays that a layer of a stack keeps of the micro-batches in flight, without a pipeline.

    Weights and constants are not among them; copies of weights are, which `recompute=none` keeps.

    Args:
      config: Config of the run, whose mesh has no -1.
      dense: Whether the layer is dense.
    """
    how = execution.of(config)

    def residuals(block: Any, x: jax.Array) -> Any:
        parts: Any = nnx.split(block, nnx.Param, ...)
        graph, weights, rest = parts

        def run(weights: Any, x: jax.Array) -> jax.Array:
            def step(block: Any, x: jax.Array) -> Any:
                return params.whole(block)(x, how)

            out: jax.Array = how.remat.layer(step)(nnx.merge(graph, weights, rest), x)[0]
            return out

        return _saved(run, weights, x)

    return jax.tree.leaves(_on_a_device(config, how, residuals, dense=dense))


def _saved(fn: Callable[..., Any], weights: Any, x: jax.Array) -> list[jax.Array]:
    """Arrays in the VJP of fn(weights, x), once each, without the weights themselves."""
    leaves = jax.tree.leaves(jax.vjp(fn, weights, x)[1])
    known = {id(weight) for weight in jax.tree.leaves(weights)}
    return list({id(leaf): leaf for leaf in leaves if id(leaf) not in known}.values())


def _on_a_device(
    config: Config, how: execution.Execution, fn: Callable[..., Any], *, dense: bool
) -> Any:
    """Shapes of fn(block, x) on a device of the mesh, with prepared weights and x BSD."""
    layout = meshes.layout(config)
    whole = jax.eval_shape(
        lambda key: Block(config.model, dense=dense, rngs=nnx.Rngs(params=key)), jax.random.key(0)
    )
    parts: Any = nnx.split(whole, nnx.Param, ...)
    graph, masters, rest = parts
    keep = layout.storage if layout.zero == 3 else lambda names, _: layout.spec(names)
    sizes = tuple(getattr(config.mesh, name) for name in MESH_AXES)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))
    ranks = math.prod(getattr(config.mesh, name) for name in DATA_AXES)
    rows = config.batch.micro_sequences // ranks * how.in_flight
    shape = rows, config.batch.length, config.model.d_model

    def local(masters: Any, rest: Any, x: jax.Array) -> Any:
        with axes.active(layout):
            weights = params.prepare(masters, how.recipe)
            return fn(nnx.merge(graph, weights, rest), x)

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(params.place(masters, keep), P(), P()),
        out_specs=P(),
        check_vma=False,
    )
    x = Leaf(shape, how.recipe.activation_dtype)
    return jax.eval_shape(mapped, masters, rest, x)
