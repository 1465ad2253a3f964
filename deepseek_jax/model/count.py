"""Parameter counts, read from the abstract model without allocating anything."""

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
      activated: parameters of the main model that one token uses: top-k of the routed experts.
      input_table: parameters of the embedding, which is looked up and not multiplied.
      mtp: parameters of the MTP modules, without the table and head of the main model.
    """

    total: int
    activated: int
    input_table: int
    mtp: int


def count(config: ModelConfig) -> Count:
    """Parameters of a model of this config: 671,026,419,200 in all for DeepSeek-V3."""
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
