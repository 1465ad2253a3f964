"""How a forward pass runs, as opposed to what it computes: values handed to the model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax.config import Config
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.experts import dispatch
from deepseek_jax.parallel.experts.dispatch import Dispatch
from deepseek_jax.precision.recipes import FLOAT32, Recipe, recipe

# What the report's recomputation keeps (section 3.2.3): all that costs a matmul or a message, but
# not the outputs of norms, MLA up-projections and SwiGLU, which are made again from these.
KEPT = (
    "query_latent", "kv_latent", "key_rope", "attention", "attended", "gate_up", "arrived", "route",
    "fed", "layer_pass",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Execution:
    """Attributes:
    recipe: precision of the matmuls.
    dispatch: how tokens reach their experts.
    recompute: "none", "full" or "report": what backward makes again instead of keeping.
    attention_block: query rows that are scored at once.
    unroll: layers of a stack that are compiled one after another instead of as a loop's body.
    flights: micro-batches that go through a layer together, one's work under the other's messages;
      the batch axis holds them one after another.
    """

    recipe: Recipe = FLOAT32
    dispatch: Dispatch = dispatch.EXACT
    recompute: str = "none"
    attention_block: int = 512
    unroll: int = 1
    in_flight: int = 1

    def layer(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, one layer, keeping for backward what this policy keeps."""
        policies = jax.checkpoint_policies
        layout = axes.current()
        if self.recompute == "full":
            return jax.checkpoint(fn, prevent_cse=False)
        if self.recompute == "report":
            kept = policies.save_only_these_names(*KEPT)
            return jax.checkpoint(fn, prevent_cse=False, policy=kept)
        if layout is not None and layout.zero == 3:
            # Keeping everything would keep each layer's gathered weights: keep what matmuls made.
            kept = policies.save_from_both_policies(
                policies.dots_saveable, policies.save_only_these_names(*KEPT)
            )
            return jax.checkpoint(fn, prevent_cse=False, policy=kept)
        return fn


def of(config: Config) -> Execution:
    return Execution(
        recipe=recipe(config.precision.recipe),
        dispatch=dispatch.of(config),
        recompute=config.layout.recompute,
        attention_block=config.layout.attention_block,
        unroll=config.layout.unroll,
        in_flight=config.layout.micro_batches_in_flight,
    )
