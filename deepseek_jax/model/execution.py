"""How a forward pass runs, as opposed to what it computes: values handed to the model."""

import dataclasses

import jax

from deepseek_jax.config import Config, PrecisionConfig
from deepseek_jax.hardware import chips
from deepseek_jax.model import kernel_choice, remat
from deepseek_jax.model.kernel_choice import KernelChoice
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
      index_loss: the loss of V3.2's indexer that a layer computes: "none"; "sparse", over selected
        positions; or "warm_up", over all, with attention to all. A model without ignores it.
    """

    recipe: Recipe = FLOAT32
    dispatch: Dispatch = dispatch.EXACT
    remat: Remat = remat.NONE
    attention_block: int = 512
    unroll: int = 1
    in_flight: int = 1
    index_loss: str = "none"


def of(config: Config, own: Recipe | None = None) -> Execution:
    """The values that a config names.

    Args:
      own: a recipe in place of the config's, for experiments; None for the config's.
    """
    chosen = own or recipe_of(config)
    return Execution(
        recipe=chosen,
        dispatch=dispatch.of(config, chosen),
        remat=remat.BY_NAME[config.layout.recompute],
        attention_block=config.layout.attention_block,
        unroll=config.layout.unroll,
        in_flight=config.layout.micro_batches_in_flight,
    )


def recipe_of(config: Config, *, serving: bool = False) -> Recipe:
    """The recipe that a config names, with the kernels that this process may use.

    The first call in a process on a GPU checks the kernels, see `kernel_choice`; all processes then
    have to call it.

    Args:
      serving: whether it is for generation with weights that the config's recipe trained.
    """
    chosen = recipe(config.precision.recipe, config.precision.scales)
    chosen = chosen.serving if serving else chosen
    kernels = kernel_choice.of(chosen, config.precision.kernels)
    return chosen.with_kernels(kernels.names, _sms(config))


def kernels_of(precision: PrecisionConfig) -> KernelChoice:
    """The kernels of the recipe that a config names, for training."""
    return kernel_choice.of(recipe(precision.recipe, precision.scales), precision.kernels)


def _sms(config: Config) -> int:
    """SMs of a GPU for kernels: without those of messages, where experts are on several devices."""
    here = getattr(jax.local_devices()[0], "core_count", None)  # of a GPU
    axes = config.layout.rules.get("experts", ())
    spread = any(getattr(config.mesh, axis) != 1 for axis in axes)
    return (here or chips.H100.sms) - spread * config.layout.communication_sms
