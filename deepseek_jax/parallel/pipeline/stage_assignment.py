"""Assignment of layers to pipeline ranks; exchange of their weights and gradients with masters.

Masters, moments and averages are independent of the pipeline: they are stacked by layer, and ZeRO
shards them over `pipe` too, innermost. Before a step each rank fetches the layers of its stages
with one all-to-all. After it, another returns the gradients; those of the two ranks that hold a
stage in DualPipe are summed. A checkpoint therefore fits any number of stages.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import Config, ConfigError, layers_per_stage, stage_count
from deepseek_jax.parallel.axes import PIPE
from deepseek_jax.parallel.pipeline.lockstep import BidirectionalStages
from deepseek_jax.parallel.pipeline.one_f_one_b import LinearStages

NOTHING = -1  # in place of a layer's number: an empty slot


def stage_map(config: Config) -> BidirectionalStages | LinearStages:
    """Stages of each rank under the schedule `layout.pipeline`.

    Raises:
      ConfigError: DualPipe with an odd number of ranks.
    """
    ranks, pipeline = config.mesh.pipe, config.layout.pipeline
    if pipeline == "dualpipe" and ranks % 2:
        raise ConfigError(f"dualpipe needs an even mesh.pipe; found mesh.pipe={ranks}")
    if pipeline == "1f1b":
        return LinearStages(ranks)
    return BidirectionalStages(ranks, stage_count(pipeline, ranks))


@dataclasses.dataclass(frozen=True)
class LayerAssignment:
    """Layers of every rank.

    Attributes:
      layers: [rank, chunk, slot] -> number of the layer, or NOTHING. The weights of an empty slot
        are zeros, with which a residual block is the identity and has no gradient.
    """

    layers: np.ndarray

    @property
    def chunks(self) -> int:
        """Chunks per rank."""
        return self.layers.shape[1]

    @property
    def slots(self) -> int:
        """Layer slots per chunk."""
        return self.layers.shape[-1]

    def rows(self, first: int, count: int) -> np.ndarray:
        """[rank, chunk * slot] -> index into a stack of the layers [first, first + count)."""
        inside = (self.layers >= first) & (self.layers < first + count)
        return np.where(inside, self.layers - first, NOTHING).reshape(len(self.layers), -1)


def assign_layers(config: Config) -> LayerAssignment:
    """Layers of every rank under this config."""
    assignment = stage_map(config)
    given = config.layout.stage_layers
    return spread(assignment, layers_per_stage(config.model.layers, assignment.stages, given))


def spread(
    assignment: BidirectionalStages | LinearStages, counts: tuple[int, ...]
) -> LayerAssignment:
    """Layers of every rank, from the stages of every rank and the number of layers per stage."""
    starts = np.cumsum((0, *counts))
    table = np.full((assignment.ranks, assignment.chunks, max(counts)), NOTHING)
    for rank in range(assignment.ranks):
        for chunk in range(assignment.chunks):
            stage = assignment.stage(rank, chunk)
            table[rank, chunk, : counts[stage]] = np.arange(starts[stage], starts[stage + 1])
    return LayerAssignment(table)


def fetch(stack: jax.Array, rows: np.ndarray, dim: int, over: tuple[str, ...]) -> jax.Array:
    """Whole weights of this rank's layers, from the ZeRO shards of all layers.

    Args:
      stack: L..., this device's shard along `dim` over the mesh axes `over`.
      rows: [ranks, R] indices into L, or NOTHING for zeros.

    Returns:
      R...
    """
    padded = jnp.concatenate([stack, jnp.zeros_like(stack[:1])])
    if PIPE not in over:
        value = padded[jnp.asarray(rows)[lax.axis_index(PIPE)]]
    else:
        value = lax.all_to_all(padded[jnp.asarray(rows)], PIPE, 0, dim + 1, tiled=True)[0]
    rest = tuple(name for name in over if name != PIPE)
    return lax.all_gather(value, rest, axis=dim, tiled=True) if rest else value


def return_gradients(
    value: jax.Array,
    rows: np.ndarray,
    layers: int,
    dim: int,
    over: tuple[str, ...],
    summed: tuple[str, ...],
) -> jax.Array:
    """Transpose of `fetch`: gradients R... of this rank's layers -> shards L... of their sums.

    Args:
      summed: mesh axes over which the weight is replicated, `over` among them.
    """
    rest = tuple(name for name in over if name != PIPE)
    if rest:
        value = lax.psum_scatter(value, rest, scatter_dimension=dim, tiled=True)
    if more := tuple(name for name in summed if name not in over and name != PIPE):
        value = lax.psum(value, more)
    if PIPE in over:
        received = lax.all_to_all(value[None], PIPE, dim + 1, 0, tiled=True)
        received = received.reshape(-1, *received.shape[2:])
        # Gathers, because a GPU adds the terms of a scatter atomically, in any order.
        parts = [received[jnp.asarray(places)] for places in _places(rows, layers)]
        return sum(parts[1:], parts[0])
    mine = jnp.asarray(rows)[lax.axis_index(PIPE)]
    sums = jnp.zeros((layers + 1, *value.shape[1:]), value.dtype).at[mine].set(value)
    return lax.psum(sums[:layers], PIPE)


def _places(rows: np.ndarray, layers: int) -> np.ndarray:
    """[ranks, R] layers -> [copies, L] places of each layer among them, all ranks in a row."""
    order = np.argsort(rows, axis=None, kind="stable")
    return order[np.sum(rows == NOTHING) :].reshape(layers, -1).T
