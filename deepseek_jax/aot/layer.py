"""MoE layer, forward and backward, lowered for a real or virtual cluster.

The compiled layer shows the messages of a layout and the GEMMs that can hide them. A layer compiles
in seconds, and the MoE layers of a model are all alike.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.aot.compiled import Kernels
from deepseek_jax.aot.hlo import FP8, Array
from deepseek_jax.config import Config
from deepseek_jax.kernels.kernel_names import OUTER, PRODUCT
from deepseek_jax.model import execution, params
from deepseek_jax.model.block import Block
from deepseek_jax.parallel import axes
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.precision import weight_gradients


def lower(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the gradient of one layer's weights and input, for the micro-batches in flight.

    Args:
      config: Config of the run.
      mesh: Real or virtual mesh (`cluster.mesh`) of the sizes of `config.mesh`.
    """
    layout, how = meshes.layout(config), execution.of(config)
    graph, weights, rest = abstract(config, how)
    batch = P(layout.mesh_axes("batch") or None)

    def placed_as_in_a_step(tree: Any) -> Any:
        return params.place(tree, lambda names, _: layout.spec(names))

    specs = placed_as_in_a_step(weights), P(), batch
    gradients = placed_as_in_a_step(jax.eval_shape(weight_gradients.carriers, weights))

    def local(weights, rest, x):
        def total(weights, x):
            block: Any = nnx.merge(graph, weights, rest)
            out, *_ = how.remat.layer(lambda block, x: block(x, how))(block, x)
            # A nonlinear loss makes backward depend on forward, as the loss of a model does.
            return jnp.sum(jnp.square(out.astype(jnp.float32)))

        with axes.active(layout):
            squares, pull = weight_gradients.vjp(total, weights, x)
            return pull(jnp.ones_like(squares))

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=(gradients, batch), check_vma=False
    )
    sequences = config.batch.micro_sequences * how.in_flight
    shape = sequences, config.batch.length, config.model.d_model
    x = jax.ShapeDtypeStruct(shape, how.recipe.activation_dtype)
    with jax.set_mesh(mesh):
        return jax.jit(mapped).lower(*placed(mesh, specs, (weights, rest, x)))


def abstract(config: Config, how: execution.Execution) -> tuple[Any, nnx.State, nnx.State]:
    """Shapes of an MoE layer: (structure, weights in the format of matmuls, other variables)."""
    whole = jax.eval_shape(
        lambda key: Block(config.model, dense=False, rngs=nnx.Rngs(params=key)), jax.random.key(0)
    )
    parts: Any = nnx.split(whole, nnx.Param, ...)
    graph, weights, rest = parts
    return graph, jax.eval_shape(lambda tree: params.prepare(tree, how.recipe), weights), rest


def placed(mesh: Mesh, specs: Any, trees: Any) -> Any:
    """Shapes of arguments with shardings from `specs`, whose tree is a prefix of `trees`."""

    def each(spec: P, tree: Any) -> Any:
        place = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
        )

    return jax.tree.map(each, specs, trees, is_leaf=lambda leaf: isinstance(leaf, P))


def _grouped_flops(arrays: tuple[Array, ...]) -> float:
    """FLOPs of a grouped matmul kernel: rows by weights (E, in, out), or rows by rows."""
    rows, other = [array.shape for array in arrays if len(array.shape) > 1][:2]
    return 2.0 * math.prod(rows) * (math.prod(other[1:]) // rows[1] if other[2:] else other[1])


def _fp8_flops(arrays: tuple[Array, ...]) -> float:
    """FLOPs of a Hopper kernel: rows MK by weights ENK, or rows KM by rows NM."""
    left, right = (array for array in arrays if array.dtype == FP8)
    return 2.0 * left.elements * right.shape[-2]


# Kernels of a layer that are products; others, as quantisers, count as memory traffic.
KERNELS: Kernels = {"pallas_call": _grouped_flops, PRODUCT: _fp8_flops, OUTER: _fp8_flops}
