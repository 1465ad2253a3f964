"""Parameter counts, read off the abstract model; nothing is allocated."""

import dataclasses
import math

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.transformer import abstract_model


@dataclasses.dataclass(frozen=True)
class Count:
    """Numbers of parameters, router biases included.

    Attributes:
      total: the main model.
      activated: of those, what one token touches: top-k of the routed experts.
      input_table: of those, the embedding, which is looked up and not multiplied.
      mtp: the MTP modules' own; table and head are the main model's.
    """

    total: int
    activated: int
    input_table: int
    mtp: int


def count(config: ModelConfig) -> Count:
    """Reads the abstract model: 671,026,419,200 for DeepSeek-V3."""
    total = active = table = mtp = 0
    for weight in params.describe(abstract_model(config)):
        size = math.prod(weight.shape)
        if weight.path.startswith("mtp."):
            mtp += size
            continue
        total += size
        routed = "experts" in weight.axes
        active += size * config.top_k // config.experts if routed else size
        table += size if weight.path.startswith("embedding.") else 0
    return Count(total, active, table, mtp)
