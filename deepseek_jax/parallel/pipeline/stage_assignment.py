"""Which layer is where in a pipeline, and the way of its weights from their masters and back.

Masters, moments and averages know nothing of the pipeline: they are stacked by layer, and ZeRO
splits them over `pipe` too, innermost. Before a step each rank fetches the layers of its stages
with one all-to-all; after it, the gradients go home the same way, where those of the two ranks that
hold a stage in DualPipe add up. So a checkpoint fits any number of stages.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import Config, ConfigError
from deepseek_jax.parallel.pipeline import schedule
from deepseek_jax.parallel.pipeline.lockstep import BidirectionalStages
from deepseek_jax.parallel.pipeline.one_f_one_b import LinearStages

NOTHING = -1
AXIS = "pipe"


def stage_map(config: Config) -> BidirectionalStages | LinearStages:
    """Who holds which stage.

    Raises:
      ConfigError: DualPipe, and an odd number of ranks.
    """
    ranks = config.mesh.pipe
    made = schedule.BY_NAME[config.layout.pipeline](ranks, 2 * ranks)
    return (
        LinearStages(ranks) if made.kind == "1f1b" else BidirectionalStages(made.ranks, made.stages)
    )


def layers_per_stage(layers: int, stages: int, given: tuple[int, ...] = ()) -> tuple[int, ...]:
    """How many layers each stage has: equally many, the last ones fewer, for they have the head.

    Raises:
      ConfigError: `given` (layout.stage_layers) are not as many as the stages or do not add up.
    """
    if not given:
        each = -(-layers // stages)
        return tuple(max(0, min(each, layers - each * stage)) for stage in range(stages))
    if len(given) != stages or sum(given) != layers or min(given) < 0:
        fitting = layers_per_stage(layers, stages)
        raise ConfigError(
            f"layout.stage_layers={given} must be {stages} numbers, one for each stage, that add "
            f"up to model.layers={layers}; set layout.stage_layers={fitting}, or () for these"
        )
    return given


@dataclasses.dataclass(frozen=True)
class LayerAssignment:
    """Where layers are: [rank, chunk, slot] -> number of the layer, or NOTHING.

    A slot without a layer has weights that are all zeros, with which a residual block changes
    nothing and gets no gradient.
    """

    layers: np.ndarray

    @property
    def chunks(self) -> int:
        """Of a rank."""
        return self.layers.shape[1]

    @property
    def slots(self) -> int:
        """Of a chunk."""
        return self.layers.shape[-1]

    def rows(self, first: int, count: int) -> np.ndarray:
        """[rank, chunk * slot] -> index into a stack of the layers [first, first + count)."""
        inside = (self.layers >= first) & (self.layers < first + count)
        return np.where(inside, self.layers - first, NOTHING).reshape(len(self.layers), -1)


def assign_layers(config: Config) -> LayerAssignment:
    held = stage_map(config)
    given = config.layout.stage_layers
    return spread(held, layers_per_stage(config.model.layers, held.stages, given))


def spread(wall: BidirectionalStages | LinearStages, split: tuple[int, ...]) -> LayerAssignment:
    """Where layers are whose stages have so many each."""
    starts = np.cumsum((0, *split))
    table = np.full((wall.ranks, wall.chunks, max(split)), NOTHING)
    for rank in range(wall.ranks):
        for chunk in range(wall.chunks):
            stage = wall.stage(rank, chunk)
            table[rank, chunk, : split[stage]] = np.arange(starts[stage], starts[stage + 1])
    return LayerAssignment(table)


def fetch(stack: jax.Array, rows: np.ndarray, dim: int, over: tuple[str, ...]) -> jax.Array:
    """The layers of this rank's stages, whole, from ZeRO parts of all layers.

    Args:
      stack: L..., split along `dim` over the mesh axes `over`.
      rows: [ranks, R] numbers in L, or NOTHING for zeros.

    Returns:
      R...
    """
    padded = jnp.concatenate([stack, jnp.zeros_like(stack[:1])])
    if AXIS not in over:
        value = padded[jnp.asarray(rows)[lax.axis_index(AXIS)]]
    else:
        value = lax.all_to_all(padded[jnp.asarray(rows)], AXIS, 0, dim + 1, tiled=True)[0]
    rest = tuple(name for name in over if name != AXIS)
    return lax.all_gather(value, rest, axis=dim, tiled=True) if rest else value


def return_gradients(
    value: jax.Array,
    rows: np.ndarray,
    layers: int,
    dim: int,
    over: tuple[str, ...],
    summed: tuple[str, ...],
) -> jax.Array:
    """The other way: gradients R... of this rank's stages -> their sums L..., split as `fetch` had.

    Args:
      summed: mesh axes along which ranks hold the same weight, `over` among them.
    """
    rest = tuple(name for name in over if name != AXIS)
    if rest:
        value = lax.psum_scatter(value, rest, scatter_dimension=dim, tiled=True)
    if more := tuple(name for name in summed if name not in over and name != AXIS):
        value = lax.psum(value, more)
    if AXIS in over:
        sent = lax.all_to_all(value[None], AXIS, dim + 1, 0, tiled=True)
        home = jnp.zeros((layers + 1, *sent.shape[2:]), value.dtype).at[jnp.asarray(rows)].add(sent)
        return home[:layers]
    mine = jnp.asarray(rows)[lax.axis_index(AXIS)]
    home = jnp.zeros((layers + 1, *value.shape[1:]), value.dtype).at[mine].add(value)
    return lax.psum(home[:layers], AXIS)
