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
from deepseek_jax.parallel.experts.exchange import Exchange, Received
from deepseek_jax.parallel.experts.overflow import Rounds
from deepseek_jax.precision.linear_input import LinearInput, SwiGLU, TiledArray
from deepseek_jax.precision.saved import Saved, save
from deepseek_jax.precision.swiglu import swiglu

FEW_TOKENS = 16  # most tokens of a decoding step that packed weights or all experts serve


def _joined(gate_up: jax.Array) -> jax.Array:
    """...2F -> ...(2F): both halves as one matmul."""
    return gate_up.reshape(*gate_up.shape[:-2], -1)


class FeedForward(nnx.Module):
    """W_down(silu(W_gate x) * W_up x): the dense layers, and the shared experts as one network."""

    def __init__(self, config: ModelConfig, width: tuple[str, int], *, rngs: nnx.Rngs):
        model, std = ("model", config.d_model), config.init_std
        self.gate_up = params.weight(rngs, model, (None, 2), width, std=std, roles="i-o")  # D2F
        self.down = params.weight(rngs, width, model, std=std, roles="io")  # FD
        self.packed: Any = None  # these weights for few tokens, model/packed_weights.py
        self.axis, self.swiglu_limit = width[0], config.swiglu_limit

    def __call__(self, x: jax.Array, how: Execution) -> jax.Array:
        einsum = how.recipe.einsum
        limit = self.swiglu_limit
        with jax.named_scope("dense_ffn" if self.axis == "dense_width" else "shared_experts"):
            gate_up = einsum("BSD,DX->BSX", axes.fan_out(x, self.axis), _joined(self.gate_up[...]))
            out = how.recipe.from_kept(
                Saved.GATE_UP,
                lambda gate_up, down: einsum("BSF,FD->BSD", SwiGLU(gate_up, limit=limit), down),
                gate_up,
                self.down[...],
            )
            return axes.fan_in(out, self.axis)

    def decode(self, x: jax.Array, how: Execution) -> jax.Array:
        """The same output for the tokens of one step of decoding, BSD."""
        tokens = x.reshape(-1, x.shape[-1])  # BSD -> (BS)D
        if self.packed is None or tokens.shape[0] > FEW_TOKENS:
            return self(x, how)
        return self.packed(tokens, jnp.ones((1, tokens.shape[0]))).reshape(x.shape)


class Experts(nnx.Module):
    """The routed experts of one layer; of a sharded layer, those on this device."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        experts, model = ("experts", config.experts), ("model", config.d_model)
        width, std = ("expert_width", config.d_expert), config.init_std
        self.gate_up = params.weight(
            rngs, experts, model, (None, 2), width, std=std, roles="-i-o"
        )  # ED2F
        self.down = params.weight(rngs, experts, width, model, std=std, roles="-io")  # EFD
        self.packed: Any = None  # these weights for few tokens, model/packed_weights.py
        self.swiglu_limit = config.swiglu_limit

    def weights(self) -> tuple[jax.Array, jax.Array]:
        """gate_up ED2F and down EFD."""
        return self.gate_up[...], self.down[...]


def through_experts(
    how: Execution, limit: float, weights: tuple[jax.Array, jax.Array], arrived: Received
) -> jax.Array | TiledArray:
    """Each row of SD through its expert's SwiGLU network, times its routing weight -> SD.

    Args:
      limit: `model.swiglu_limit`.
      weights: gate_up ED2F and down EFD of the local experts.
    """
    up = into_experts(how, weights[0], arrived.rows, arrived)
    return out_of_experts(how, limit, weights[1], up, arrived.weights, arrived)


def expert_rounds(how: Execution, limit: float) -> Rounds:
    """The dispatch with these experts between its two steps; `limit` is `model.swiglu_limit`."""
    return Rounds(how.dispatch, functools.partial(through_experts, how, limit))


@jax.named_scope("experts")
def into_experts(
    how: Execution, gate_up: jax.Array, rows: LinearInput, arrived: Received
) -> jax.Array:
    """SD through its experts' gate_up ED2F -> S(2F)."""
    return how.recipe.grouped(rows, _joined(gate_up), arrived.sizes, arrived.likely)


@jax.named_scope("experts")
def out_of_experts(
    how: Execution,
    limit: float,
    down: jax.Array,
    up: jax.Array,
    weights: jax.Array,
    arrived: Received,
) -> jax.Array | TiledArray:
    """S(2F) through SwiGLU and its experts' down EFD, times the routing weights S -> SD.

    The weight goes in before W_down, which is linear: so backward needs no outputs of experts. The
    output's gradient arrives as the payload encodes it, hence the type of the result.
    """
    recipe = how.recipe
    grouped = recipe.grouped_for_message if how.dispatch.payload.fp8 else recipe.grouped

    def layer(up: Any, down: Any, weights: jax.Array, sizes: jax.Array) -> jax.Array | TiledArray:
        return grouped(SwiGLU(up, weights, limit), down, sizes, arrived.likely)

    return how.recipe.from_kept(Saved.GATE_UP, layer, up, down, weights, arrived.sizes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated:
    """Tokens of a layer and their routing, before any token is sent.

    Attributes:
      tokens: (BS)D, the layer's normalised input.
      weights: (BS)K float32, routing weights.
      chosen: (BS)K int32, experts or slots of their copies.
      routing: the gate's decision.
    """

    tokens: jax.Array
    weights: jax.Array
    chosen: jax.Array
    routing: Routing

    def exchange(self, experts: Any, total: int, left: jax.Array) -> Exchange:
        """The exchange that serves the choices `left`, (BS)K bool.

        Args:
          experts: weights of the local experts.
          total: number of experts, or of slots for their copies.
        """
        return Exchange(self.tokens, self.weights, self.chosen, left, total, experts)


class MixtureOfExperts(nnx.Module):
    """x -> sum of chosen experts, weighted, + shared experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.router = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        if config.shared_experts:
            self.shared = FeedForward(config, ("expert_width", config.d_shared), rngs=rngs)
        self.slots: Any = None  # slots of copies of experts, model/redundant_experts.py
        self.config = config

    def __call__(self, x: jax.Array, how: Execution) -> tuple[jax.Array, Routing]:
        """x BSD, normalised -> BSD before the residual is added, and the gate's decision."""
        limit = self.config.swiglu_limit
        gated, rounds = self.gate(x), expert_rounds(how, limit)
        every_choice = jnp.ones_like(gated.chosen, dtype=jnp.bool_)
        exchange = gated.exchange(self.experts.weights(), self.places, every_choice)
        first, served = rounds.one(exchange)
        routed, routing = finish(how, limit, gated.routing, exchange.after(served), first)
        out = routed.reshape(x.shape)
        if self.config.shared_experts:
            out = out + self.shared(x, how)
        return save(Saved.MOE_OUTPUT, out), routing

    def decode(self, x: jax.Array, how: Execution) -> jax.Array:
        """The same output for the tokens of one step of decoding, BSD."""
        if not self.runs_all_experts(x.shape[0] * x.shape[1]):
            return self(x, how)[0]
        routed = through_every_expert(how, self.experts, self.gate(x))
        out = axes.fan_in(routed, "expert_width").reshape(x.shape)
        return out + self.shared.decode(x, how) if self.config.shared_experts else out

    def runs_all_experts(self, tokens: int) -> bool:
        """Whether all experts on so few tokens run faster than each token's own experts.

        True when tokens * top_k >= 2 * experts, for then 6 of 7 experts are read anyway (estimated
        for a uniform router); with packed CPU weights from experts / 4 on (measured).
        """
        if axes.size("experts") > 1 or self.slots is not None or tokens > FEW_TOKENS:
            return False
        enough = 0.25 if self.experts.packed is not None else 2.0
        return tokens * self.config.top_k >= enough * self.config.experts

    def gate(self, x: jax.Array) -> Gated:
        """Experts of each token of x BSD; with redundant experts, the slots of their copies."""
        gated = gate(self.router, x)
        if self.slots is None:
            return gated
        chosen = slots_for(gated.chosen, self.slots.placement(), axes.index("experts"))
        return dataclasses.replace(gated, chosen=chosen)

    @property
    def places(self) -> int:
        """Number of destinations of tokens: experts, or the slots of their copies."""
        return self.config.experts if self.slots is None else self.slots.expert[...].shape[-1]


@jax.named_scope("experts")
def through_every_expert(how: Execution, experts: Experts, gated: Gated) -> jax.Array:
    """Each token through all experts, times 0 where it did not choose them: (BS)D.

    Where most experts are read for some token, sorting the tokens costs more than multiplying all.
    """
    (gate_up, down), tokens = experts.weights(), gated.tokens
    payload = how.dispatch.payload
    tokens = payload.decode(payload.encode(tokens), tokens.dtype)  # as if they had travelled
    spread = jax.nn.one_hot(gated.chosen, down.shape[0]) * gated.weights[..., None]  # MKE
    scale = spread.sum(1).T  # EM
    if experts.packed is not None:
        return experts.packed(tokens, scale)
    # On a CPU, XLA is slow with rows that a batch of matrices shares: so each matrix has its own.
    rows = jnp.broadcast_to(tokens, (down.shape[0], *tokens.shape))
    both = how.recipe.einsum("EMD,EDX->EMX", rows, _joined(gate_up))
    hidden = swiglu(both, limit=experts.swiglu_limit)
    return how.recipe.einsum("EMF,EFD->MD", scaled(hidden, scale[..., None]), down)


def scaled(hidden: jax.Array, scale: jax.Array) -> jax.Array:
    """`hidden` times `scale`; 0 where the scale is 0, even of numbers that are not finite."""
    return jnp.where(scale != 0, hidden.astype(jnp.float32) * scale, 0.0).astype(hidden.dtype)


def gate(router: Router, x: jax.Array, before: jax.Array | None = None) -> Gated:
    """Experts of each token of x BSD, and their weights.

    Args:
      before: (BS)K, a choice that was made already and is only to be weighed.
    """
    known = None if before is None else before.reshape(*x.shape[:-1], -1)
    routing = router(x, known)
    tokens = x.reshape(-1, x.shape[-1])  # BSD -> (BS)D
    chosen = routing.experts.reshape(tokens.shape[0], -1)
    weights = routing.weights.reshape(chosen.shape)
    tokens, weights = (axes.fan_out(part, "expert_width") for part in (tokens, weights))
    return Gated(tokens, weights, chosen, routing)


def finish(
    how: Execution, limit: float, routing: Routing, exchange: Exchange, first: jax.Array
) -> tuple[jax.Array, Routing]:
    """Overflow rounds, if need be.

    Args:
      limit: `model.swiglu_limit`.
      exchange: after its first round.
      first: (BS)D, the sum of this round.

    Returns:
      (BS)D, the sum over all choices; and the routing with the number of rounds.
    """
    routed, rounds = expert_rounds(how, limit).rest(exchange, first)
    traffic = dataclasses.replace(routing.traffic, rounds=rounds)
    return axes.fan_in(routed, "expert_width"), dataclasses.replace(routing, traffic=traffic)
