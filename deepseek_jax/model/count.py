"""Parameter counts of the abstract model; nothing is allocated."""

import dataclasses
import functools
import math

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.params import Weight
from deepseek_jax.model.transformer import abstract_model


@dataclasses.dataclass(frozen=True)
class Count:
    """Numbers of parameters, router biases included.

    Attributes:
      total: Parameters of the main model.
      activated: Part of `total` that one token uses, with top-k of the routed experts.
      input_table: Part of `activated` in the embedding, which is looked up, not multiplied.
      mtp: Parameters of the MTP modules, without the shared embedding and head.
    """

    total: int
    activated: int
    input_table: int
    mtp: int


@functools.lru_cache(maxsize=64)
def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Descriptions of all parameters; their shapes cost the same to find at any size."""
    return tuple(params.describe(abstract_model(config)))


def count(config: ModelConfig) -> Count:
    """Counts the parameters of a model; DeepSeek-V3 has 671,026,419,200."""
    total = active = table = mtp = 0
    for weight in weights(config):
        size = math.prod(weight.shape)
        if weight.path.startswith("mtp."):
            mtp += size
            continue
        total += size
        routed = "experts" in weight.axes
        active += size * config.top_k // config.experts if routed else size
        table += size if weight.path.startswith("embedding.") else 0
    return Count(total, active, table, mtp)
