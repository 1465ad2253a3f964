"""One MoE layer, forward and backward, compiled for the cluster it is meant for.

What a layout's messages are and what they can hide under is read from this program: a layer is
seconds to compile, and the layers of a model are all alike.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.aot.compiled import Kernels
from deepseek_jax.aot.hlo import Array
from deepseek_jax.config import Config
from deepseek_jax.model import execution, params
from deepseek_jax.model.block import Block
from deepseek_jax.parallel import axes
from deepseek_jax.parallel import mesh as meshes


def lower(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The gradients of one layer's weights and input, for the micro-batches that are in flight.

    Args:
      mesh: real or virtual (`cluster.mesh`), of the sizes of `config.mesh`.
    """
    layout, how = meshes.layout(config), execution.of(config)
    graph, weights, rest = abstract(config, how)
    batch = P(layout.mesh_axes("batch") or None)
    specs = params.place(weights, lambda names, _: layout.spec(names)), P(), batch

    def local(weights, rest, x):
        def total(weights, x):
            block: Any = nnx.merge(graph, weights, rest)
            out, _ = how.remat.layer(lambda block, x: block(x, how))(block, x)
            # Backward has to wait for forward, as it does for the loss of a model.
            return jnp.sum(jnp.square(out.astype(jnp.float32)))

        with axes.active(layout):
            return jax.grad(total, (0, 1))(weights, x)

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=(specs[0], batch), check_vma=False
    )
    sequences = config.batch.micro_sequences * how.in_flight
    shape = sequences, config.batch.length, config.model.d_model
    x = jax.ShapeDtypeStruct(shape, how.recipe.compute)
    with jax.set_mesh(mesh):
        return jax.jit(mapped).lower(*placed(mesh, specs, (weights, rest, x)))


def abstract(config: Config, how: execution.Execution) -> tuple[Any, nnx.State, nnx.State]:
    """(structure, weights as matmuls read them, the rest) of a MoE layer, shapes only."""
    whole = jax.eval_shape(
        lambda key: Block(config.model, dense=False, rngs=nnx.Rngs(params=key)), jax.random.key(0)
    )
    parts: Any = nnx.split(whole, nnx.Param, ...)
    graph, weights, rest = parts
    return graph, jax.eval_shape(lambda tree: params.cast(tree, how.recipe.compute), weights), rest


def placed(mesh: Mesh, specs: Any, trees: Any) -> Any:
    """Shapes of arguments that live as `specs` say, a prefix of the trees."""

    def each(spec: P, tree: Any) -> Any:
        place = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
        )

    return jax.tree.map(each, specs, trees, is_leaf=lambda leaf: isinstance(leaf, P))


def _grouped_flops(arrays: tuple[Array, ...]) -> float:
    """Of the grouped matmul's kernels: rows by weights (E, in, out), or rows by rows."""
    rows, other = [array.shape for array in arrays if len(array.shape) > 1][:2]
    return 2.0 * math.prod(rows) * (math.prod(other[1:]) // rows[1] if other[2:] else other[1])


KERNELS: Kernels = {"pallas_call": _grouped_flops}  # the only Pallas kernels in a layer
