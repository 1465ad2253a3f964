"""Redundant experts: copies of the busiest experts on several GPUs, for serving (section 3.4.1).

The copies of an expert share its tokens, and the results are the same. Forward only: the gradients
of copies are not summed.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model import params
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.experts.balancer import Placement


class ExpertSlots(nnx.Module):
    """Expert slots of a MoE layer, as variables of the model; see `Placement`."""

    def __init__(self, placement: Placement):
        self.of_expert = params.table(jnp.asarray(placement.slots_of_expert))  # EC
        self.copies = params.table(jnp.asarray(placement.copies))  # E
        self.expert = params.table(jnp.asarray(placement.expert_of_slot))  # R

    def placement(self) -> Placement:
        """Slots as a `Placement`."""
        tables: Any = (self.expert[...], self.of_expert[...], self.copies[...])
        return Placement(*tables)


def with_redundant_experts(model: Transformer, placement: Placement) -> Transformer:
    """New model whose MoE layers hold their experts in the expert slots of `placement`.

    Args:
      placement: placement of all MoE layers of the main model, in order.

    Returns:
      The model. Its expert weights are LR..., still with the logical axis "experts", so R must be a
      multiple of the devices that shard experts.
    """
    model = nnx.merge(*nnx.split(model))
    mixture, expert = model.moe_layers.feed, jnp.asarray(placement.expert_of_slot)
    for name in ("gate_up", "down"):
        setattr(mixture.experts, name, params.per_slot(getattr(mixture.experts, name), expert))
    mixture.slots = nnx.data(ExpertSlots(placement))
    return model
