"""How a forward pass runs, as opposed to what it computes: values handed to the model."""

import dataclasses

from deepseek_jax.config import Config
from deepseek_jax.model import remat
from deepseek_jax.model.remat import Remat
from deepseek_jax.parallel.experts import dispatch
from deepseek_jax.parallel.experts.exchange import Dispatch
from deepseek_jax.precision.recipes import FLOAT32, Recipe, recipe


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model runs.

    Attributes:
      recipe: precision of the matmuls.
      dispatch: transport of tokens to their experts.
      remat: recompute policy of the layers.
      attention_block: query rows whose scores are computed at once.
      unroll: layers of a stack that are compiled one after another instead of as a loop's body.
      in_flight: micro-batches that go through a layer together, the matmuls of one under the
        messages of another; they stand one after another along the batch axis.
    """

    recipe: Recipe = FLOAT32
    dispatch: Dispatch = dispatch.EXACT
    remat: Remat = remat.NONE
    attention_block: int = 512
    unroll: int = 1
    in_flight: int = 1


def of(config: Config, own: Recipe | None = None) -> Execution:
    """The values that a config names.

    Args:
      own: a recipe in place of the config's, for experiments; None for the config's.
    """
    return Execution(
        recipe=own or recipe(config.precision.recipe, config.precision.scales),
        dispatch=dispatch.of(config),
        remat=remat.BY_NAME[config.layout.recompute],
        attention_block=config.layout.attention_block,
        unroll=config.layout.unroll,
        in_flight=config.layout.micro_batches_in_flight,
    )
