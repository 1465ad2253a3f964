"""Redundant experts: the busiest ones on several GPUs, for serving (section 3.4.1).

A model whose experts are held by slots computes the same, forward only: copies of an expert share
its tokens, and nothing would keep their gradients together.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model import params
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.experts.balancer import Placement


class ExpertSlots(nnx.Module):
    """Where the copies of each expert of a MoE layer are, see `Placement`."""

    def __init__(self, placement: Placement):
        self.of_expert = params.table(jnp.asarray(placement.slots_of_expert))  # EC
        self.copies = params.table(jnp.asarray(placement.copies))  # E
        self.expert = params.table(jnp.asarray(placement.expert_of_slot))  # R

    def placement(self) -> Placement:
        tables: Any = (self.expert[...], self.of_expert[...], self.copies[...])
        return Placement(*tables)


def with_redundant_experts(model: Transformer, placement: Placement) -> Transformer:
    """The same model, whose MoE layers keep their experts where `placement` says.

    Args:
      placement: of all MoE layers of the main model, in order.

    Returns:
      A new model. Its experts' weights are LR..., under the logical axis "experts" as before, so R
      must divide among the devices that experts are split over.
    """
    model = nnx.merge(*nnx.split(model))
    mixture, expert = model.moe_layers.feed, jnp.asarray(placement.expert_of_slot)
    for name in ("gate_up", "down"):
        setattr(mixture.experts, name, params.per_slot(getattr(mixture.experts, name), expert))
    mixture.slots = nnx.data(ExpertSlots(placement))
    return model
