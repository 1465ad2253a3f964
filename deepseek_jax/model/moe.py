"""DeepSeekMoE: shared and routed experts (section 2.1.2, equation 12); the dense feed-forward."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.router import Router, Routing
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.dispatch import Arrived
from deepseek_jax.parallel.placement import slots_for
from deepseek_jax.parallel.rounds import complete


def swiglu(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up in float32 from ...(2F), gate first; ...F in the dtype it was given."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def _joined(gate_up: jax.Array) -> jax.Array:
    """...2F -> ...(2F): both halves as one matmul."""
    return gate_up.reshape(*gate_up.shape[:-2], -1)


class FeedForward(nnx.Module):
    """W_down(silu(W_gate x) * W_up x): the dense layers, and the shared experts as one network."""

    def __init__(self, config: ModelConfig, width: tuple[str, int], *, rngs: nnx.Rngs):
        model, std = ("model", config.d_model), config.init_std
        self.gate_up = params.weight(rngs, model, (None, 2), width, std=std)  # D2F
        self.down = params.weight(rngs, width, model, std=std)  # FD
        self.axis = width[0]

    def __call__(self, x: jax.Array, how: Execution) -> jax.Array:
        einsum = how.recipe.einsum
        gate_up = einsum("BSD,DX->BSX", axes.fan_out(x, self.axis), _joined(self.gate_up[...]))
        hidden = swiglu(checkpoint_name(gate_up, "gate_up"))
        return axes.fan_in(einsum("BSF,FD->BSD", hidden, self.down[...]), self.axis)


class Experts(nnx.Module):
    """The routed experts of one layer, whichever of them are here."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        experts, model = ("experts", config.experts), ("model", config.d_model)
        width, std = ("expert_width", config.d_expert), config.init_std
        self.gate_up = params.weight(rngs, experts, model, (None, 2), width, std=std)  # ED2F
        self.down = params.weight(rngs, experts, width, model, std=std)  # EFD

    def weights(self) -> tuple[jax.Array, jax.Array]:
        return self.gate_up[...], self.down[...]


def through_experts(
    how: Execution, weights: tuple[jax.Array, jax.Array], arrived: Arrived
) -> jax.Array:
    """Each row of SD through its expert's SwiGLU network, times its routing weight -> SD.

    The weight goes in before W_down, which is linear: so backward needs no expert outputs.
    """
    (gate_up, down), sizes, likely = weights, arrived.sizes, arrived.likely
    grouped = how.recipe.grouped
    hidden = swiglu(
        checkpoint_name(grouped(arrived.rows, _joined(gate_up), sizes, likely), "gate_up")
    )
    hidden = (hidden.astype(jnp.float32) * arrived.weights[:, None]).astype(hidden.dtype)
    return grouped(hidden, down, sizes, likely)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sent:
    """A layer's tokens on their way: what `send` knows that the later steps need.

    Attributes:
      x: BSD, the layer's normalised input.
      tokens, weights, chosen: what was sent of it, (BS)D, and where to, (BS)K.
      routing: the gate's decision.
      arrived: what came to the experts that are here.
    """

    x: jax.Array
    tokens: jax.Array
    weights: jax.Array
    chosen: jax.Array
    routing: Routing
    arrived: Arrived


class MixtureOfExperts(nnx.Module):
    """x -> sum of chosen experts, weighted, + shared experts.

    In three steps, so that two micro-batches, or a forward and a backward chunk, can take turns.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.router = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        if config.shared_experts:
            self.shared = FeedForward(config, ("expert_width", config.d_shared), rngs=rngs)
        self.slots: Any = None  # where copies of experts are, model/redundancy.py
        self.config = config

    def send(self, x: jax.Array, how: Execution) -> Sent:
        """x BSD, normalised: to the gate, and every token on its way to its experts."""
        routing = self.router(x)
        tokens = x.reshape(-1, x.shape[-1])  # BSD -> (BS)D
        chosen = routing.experts.reshape(tokens.shape[0], -1)
        weights = routing.weights.reshape(chosen.shape)
        tokens, weights = (axes.fan_out(part, "expert_width") for part in (tokens, weights))
        if self.slots is not None:
            chosen = slots_for(chosen, self.slots.placement(), axes.index("experts"))
        everything = jnp.ones_like(chosen, dtype=jnp.bool_)
        arrived = how.dispatch.send(tokens, weights, chosen, everything, self.places)
        return Sent(x, tokens, weights, chosen, routing, arrived)

    @property
    def places(self) -> int:
        """What tokens are sent to: experts, or the slots of their copies."""
        return self.config.experts if self.slots is None else self.slots.expert[...].shape[-1]

    def work(self, sent: Sent, how: Execution) -> jax.Array:
        """What the experts that are here make of what came to them, SD."""
        return through_experts(how, self.experts.weights(), sent.arrived)

    def combine(self, sent: Sent, out: jax.Array, how: Execution) -> tuple[jax.Array, Routing]:
        """Brings SD home -> BSD before the residual, and what the gate decided."""
        first = how.dispatch.combine(out, sent.arrived.route)
        routed, rounds = complete(
            how.dispatch,
            functools.partial(through_experts, how),
            self.experts.weights(),
            sent.tokens,
            sent.weights,
            sent.chosen,
            self.places,
            first,
        )
        out = axes.fan_in(routed, "expert_width").reshape(sent.x.shape)
        if self.config.shared_experts:
            out = out + self.shared(sent.x, how)
        traffic = dataclasses.replace(sent.routing.traffic, rounds=rounds)
        return checkpoint_name(out, "fed"), dataclasses.replace(sent.routing, traffic=traffic)

    def __call__(self, x: jax.Array, how: Execution) -> tuple[jax.Array, Routing]:
        sent = self.send(x, how)
        return self.combine(sent, self.work(sent, how), how)
