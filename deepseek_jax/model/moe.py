"""DeepSeekMoE: shared and routed experts (section 2.1.2, equation 12); the dense feed-forward."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.router import Router, Routing
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.experts.balancer import slots_for
from deepseek_jax.parallel.experts.dispatch import Received
from deepseek_jax.parallel.experts.overflow import complete
from deepseek_jax.precision.payload import Payload
from deepseek_jax.precision.saved import Saved, save

FEW_TOKENS = 16  # of one step of decoding


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
        self.packed: Any = None  # the same for few tokens, model/packed_weights.py
        self.axis = width[0]

    def __call__(self, x: jax.Array, how: Execution) -> jax.Array:
        einsum = how.recipe.einsum
        gate_up = einsum("BSD,DX->BSX", axes.fan_out(x, self.axis), _joined(self.gate_up[...]))
        hidden = swiglu(save(Saved.GATE_UP, gate_up))
        return axes.fan_in(einsum("BSF,FD->BSD", hidden, self.down[...]), self.axis)

    def decode(self, x: jax.Array, how: Execution) -> jax.Array:
        """The same for the tokens of one step of decoding, BSD."""
        tokens = x.reshape(-1, x.shape[-1])  # BSD -> (BS)D
        if self.packed is None or tokens.shape[0] > FEW_TOKENS:
            return self(x, how)
        return self.packed(tokens, jnp.ones((1, tokens.shape[0]))).reshape(x.shape)


class Experts(nnx.Module):
    """The routed experts of one layer, whichever of them are here."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        experts, model = ("experts", config.experts), ("model", config.d_model)
        width, std = ("expert_width", config.d_expert), config.init_std
        self.gate_up = params.weight(rngs, experts, model, (None, 2), width, std=std)  # ED2F
        self.down = params.weight(rngs, experts, width, model, std=std)  # EFD
        self.packed: Any = None  # the same for few tokens, model/packed_weights.py

    def weights(self) -> tuple[jax.Array, jax.Array]:
        return self.gate_up[...], self.down[...]


def through_experts(
    how: Execution, weights: tuple[jax.Array, jax.Array], arrived: Received
) -> jax.Array:
    """Each row of SD through its expert's SwiGLU network, times its routing weight -> SD."""
    up = into_experts(how, weights[0], arrived.rows, arrived)
    return out_of_experts(how, weights[1], up, arrived.weights, arrived)


def into_experts(how: Execution, gate_up: jax.Array, rows: jax.Array, arrived: Received):
    """SD through its experts' gate_up ED2F -> S(2F)."""
    up = how.recipe.grouped(rows, _joined(gate_up), arrived.sizes, arrived.likely)
    return save(Saved.GATE_UP, up)


def out_of_experts(
    how: Execution, down: jax.Array, up: jax.Array, weights: jax.Array, arrived: Received
) -> jax.Array:
    """S(2F) through SwiGLU and its experts' down EFD, times the routing weights S -> SD.

    The weight goes in before W_down, which is linear: so backward needs no expert outputs.
    """
    hidden = swiglu(up)
    hidden = (hidden.astype(jnp.float32) * weights[:, None]).astype(hidden.dtype)
    return how.recipe.grouped(hidden, down, arrived.sizes, arrived.likely)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated:
    """What is known of a layer's tokens before any is sent.

    Attributes:
      tokens: (BS)D, the layer's normalised input.
      weights, chosen: (BS)K, how much of which expert each token gets.
      routing: the gate's decision.
    """

    tokens: jax.Array
    weights: jax.Array
    chosen: jax.Array
    routing: Routing


class MixtureOfExperts(nnx.Module):
    """x -> sum of chosen experts, weighted, + shared experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.router = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        if config.shared_experts:
            self.shared = FeedForward(config, ("expert_width", config.d_shared), rngs=rngs)
        self.slots: Any = None  # where copies of experts are, model/redundant_experts.py
        self.config = config

    def __call__(self, x: jax.Array, how: Execution) -> tuple[jax.Array, Routing]:
        """x BSD, normalised -> BSD before the residual, and what the gate decided."""
        gated, places = self.gate(x), self.places
        everything = jnp.ones_like(gated.chosen, dtype=jnp.bool_)
        arrived = how.dispatch.send(gated.tokens, gated.weights, gated.chosen, everything, places)
        out = through_experts(how, self.experts.weights(), arrived)
        first = how.dispatch.combine(out, arrived.route)
        routed, routing = finish(how, self.experts.weights(), gated, first, places)
        out = routed.reshape(x.shape)
        if self.config.shared_experts:
            out = out + self.shared(x, how)
        return save(Saved.FED, out), routing

    def decode(self, x: jax.Array, how: Execution) -> jax.Array:
        """The same for the tokens of one step of decoding, BSD."""
        if not self.read_whole(x.shape[0] * x.shape[1]):
            return self(x, how)[0]
        routed = through_every_expert(how, self.experts, self.gate(x))
        out = axes.fan_in(routed, "expert_width").reshape(x.shape)
        return out + self.shared.decode(x, how) if self.config.shared_experts else out

    def read_whole(self, tokens: int) -> bool:
        """Whether these few go through all experts sooner than each through its own.

        Where they choose all but a seventh of them; on a CPU, which reads strips at twice the speed
        and is slow to sort, as measured where they make half as many choices as there are experts.
        """
        if axes.size("experts") > 1 or self.slots is not None or tokens > FEW_TOKENS:
            return False
        enough = 0.5 if self.experts.packed is not None else 2.0
        return tokens * self.config.top_k >= enough * self.config.experts

    def gate(self, x: jax.Array) -> Gated:
        gated = gate(self.router, x)
        if self.slots is None:
            return gated
        chosen = slots_for(gated.chosen, self.slots.placement(), axes.index("experts"))
        return dataclasses.replace(gated, chosen=chosen)

    @property
    def places(self) -> int:
        """What tokens are sent to: experts, or the slots of their copies."""
        return self.config.experts if self.slots is None else self.slots.expert[...].shape[-1]


def through_every_expert(how: Execution, experts: Experts, gated: Gated) -> jax.Array:
    """Each token through all experts, times 0 where it did not choose them: (BS)D.

    Where most experts are read for some token, to sort the tokens costs more than to multiply all.
    """
    (gate_up, down), tokens = experts.weights(), gated.tokens
    payload: Payload = how.dispatch.payload  # type: ignore[attr-defined]
    tokens = payload.decode(payload.encode(tokens), tokens.dtype)  # as if they had travelled
    spread = jax.nn.one_hot(gated.chosen, down.shape[0]) * gated.weights[..., None]  # MKE
    scale = spread.sum(1).T  # EM
    if experts.packed is not None:
        return experts.packed(tokens, scale)
    # On a CPU, XLA is slow with rows that all matrices of a batch share: so each has its own.
    rows = jnp.broadcast_to(tokens, (down.shape[0], *tokens.shape))
    hidden = swiglu(how.recipe.einsum("EMD,EDX->EMX", rows, _joined(gate_up)))
    return how.recipe.einsum("EMF,EFD->MD", scaled_rows(hidden, scale), down)


def scaled_rows(hidden: jax.Array, scale: jax.Array) -> jax.Array:
    """EMF times EM; where that is 0 nothing is left, not even of what is not finite."""
    scale = scale[..., None]
    return jnp.where(scale != 0, hidden.astype(jnp.float32) * scale, 0.0).astype(hidden.dtype)


def gate(router: Router, x: jax.Array, before: jax.Array | None = None) -> Gated:
    """Which experts x BSD goes to; with `before`, (BS)K, those that were chosen already."""
    known = None if before is None else before.reshape(*x.shape[:-1], -1)
    routing = router(x, known)
    tokens = x.reshape(-1, x.shape[-1])  # BSD -> (BS)D
    chosen = routing.experts.reshape(tokens.shape[0], -1)
    weights = routing.weights.reshape(chosen.shape)
    tokens, weights = (axes.fan_out(part, "expert_width") for part in (tokens, weights))
    return Gated(tokens, weights, chosen, routing)


def finish(
    how: Execution,
    experts: tuple[jax.Array, jax.Array],
    gated: Gated,
    first: tuple[jax.Array, jax.Array],
    places: int,
) -> tuple[jax.Array, Routing]:
    """What came home in the first round, and in further ones if need be: (BS)D."""
    work = functools.partial(through_experts, how)
    sent = gated.tokens, gated.weights, gated.chosen
    routed, rounds = complete(how.dispatch, work, experts, *sent, places, first)
    traffic = dataclasses.replace(gated.routing.traffic, rounds=rounds)
    routing = dataclasses.replace(gated.routing, traffic=traffic)
    return axes.fan_in(routed, "expert_width"), routing
