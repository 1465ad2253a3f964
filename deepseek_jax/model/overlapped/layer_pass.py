"""Forward and backward of a MoE layer in steps, which can be interleaved with other work.

A step is attention, a hop, or a matmul of the experts, and a table of turns says which steps stand
side by side. Here those of two micro-batches in forward, with two hops; backward mirrors it. A step
computes what a `Block` computes; only the order is decided here.

    turn       1          2         3      4      5     6       7         8
    a      attention   hop, hop  gate_up  down   hop   hop   shared
    b                 attention    hop    hop  gate_up down    hop   hop, shared

Two entries of a column are independent, so a message can travel under matmuls.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model import remat
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.mla import attend
from deepseek_jax.model.moe import (
    Gated,
    expert_rounds,
    finish,
    gate,
    into_experts,
    out_of_experts,
)
from deepseek_jax.model.overlapped.layer_modules import MOE_LAYER, LayerKind
from deepseek_jax.model.overlapped.residuals import (
    Residuals,
    with_weights,
    with_zeros_for_deferred,
    without_weights,
)
from deepseek_jax.model.router import Routing
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.experts.exchange import (
    Exchange,
    Received,
    SteppedDispatch,
    cotangent,
)
from deepseek_jax.parallel.overlap import Steps, beside, with_scope
from deepseek_jax.parallel.pipeline import split_backward
from deepseek_jax.precision import weight_gradients
from deepseek_jax.precision.linear_input import TiledArray, numbers


def stepped(how: Execution) -> SteppedDispatch:
    """The dispatch with a step for each hop."""
    dispatch = how.dispatch.in_steps
    assert dispatch is not None  # by the rules of `config`
    return dispatch


def hops_of(how: Execution) -> int:
    """Number of all-to-alls that take a token to its experts."""
    return len(stepped(how).hop_axes())


@dataclasses.dataclass(frozen=True)
class LayerPass:
    """A layer that runs in steps.

    Attributes:
      how: recipe, dispatch and recompute policy.
      experts: E.
      weights: by step, see `layer_weights`.
      kind: kind of the layer.
      defer: whether backward leaves gradients of weights for later (zero bubble's W).
      recompute_all: full recomputation by the pass itself. It saves only the layer's input and the
        tokens; backward recomputes attention. Without it, full recomputation is left to the
        checkpoint around the layer.
      resend: whether the tokens are saved as received over the slow hop. Backward resends them over
        the fast hop in one message with the output's gradients. No effect where one hop is all.
    """

    how: Execution
    experts: int
    weights: dict[str, Any]
    kind: LayerKind = MOE_LAYER
    defer: bool = False
    recompute_all: bool = False
    resend: bool = False

    def forward(self, x: jax.Array) -> "ForwardPass":
        """The forward pass of one micro-batch, x BSD."""
        return ForwardPass(self, x)

    def backward(
        self, residuals: Residuals, d_out: jax.Array, d_routing: Routing
    ) -> "BackwardPass":
        """The backward pass of one micro-batch.

        Args:
          residuals: those of its forward pass.
          d_out: BSD, gradient of the layer's output.
          d_routing: gradient of its routing.
        """
        return BackwardPass(self, residuals, d_out, d_routing)

    def routing_gradient(
        self, like: jax.Array, d_balance: jax.Array, d_index_loss: jax.Array | None = None
    ) -> Routing:
        """Cotangent of the `Routing`: zero except for `balance` and `index_loss`.

        Args:
          like: BSD, shape and dtype of the layer's input.
        """

        def nothing(leaf: Any) -> Any:
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                return jnp.zeros(leaf.shape, leaf.dtype)
            return np.zeros(leaf.shape, jax.dtypes.float0)

        routing = jax.eval_shape(self.gate, self.weights["gate"], like).routing
        routing = jax.tree.map(nothing, routing)
        return dataclasses.replace(routing, balance=d_balance, index_loss=d_index_loss)

    @property
    def swiglu_limit(self) -> float:
        """The clamp of the experts' SwiGLU."""
        return float(self.weights["gate"][1].config.swiglu_limit)

    @property
    def recomputes_shared(self) -> bool:
        """Whether backward recomputes the step beside the experts, given its input.

        A slot that may have a dense layer would save the input of the wide network's SwiGLU on all
        ranks, of which one has a dense layer. It recomputes where tokens are resent.
        """
        shared = self.weights["shared"]
        if shared is None:
            return False
        return self.recompute_all or (self.resend and len(shared) > 2)

    # What a step computes.

    def attend(self, weights: Any, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """x + MLA(norm x), BSD; and the indexer's loss, () or None."""
        norm, attention = weights
        return attend(norm, attention, x, self.how)

    def gate(self, weights: Any, x: jax.Array, chosen: jax.Array | None = None) -> Gated:
        """Experts of each token, or the weights of those that are `chosen` already."""
        norm, router = weights
        return gate(router, norm(x), chosen)

    def beside_experts(self, weights: Any, x: jax.Array) -> jax.Array:
        """Output of the shared experts, or of a dense layer's wide network: BSD."""
        norm, shared, *dense = weights
        x = norm(x)
        if not dense:
            return shared(x, self.how)
        narrow = (lambda x: shared(x, self.how)) if shared is not None else jnp.zeros_like
        return jax.lax.cond(self.kind.dense, lambda x: dense[0](x, self.how), narrow, x)


class _Pass:
    """Values of one micro-batch on its way through a layer, forward or backward.

    Attributes:
      x: BSD, the residual stream after attention.
      arrived: copies that this device's experts received, as they travelled.
    """

    x: jax.Array
    arrived: Received

    def __init__(self, layer: LayerPass) -> None:
        self.layer, self.how, self.weights = layer, layer.how, layer.weights
        self.dispatch = stepped(layer.how)

    def _rows(self) -> jax.Array | TiledArray:
        return self.dispatch.payload.received(self.arrived.rows, self.x.dtype)

    def _into(self, gate_up: jax.Array, rows: jax.Array | TiledArray) -> jax.Array:
        return into_experts(self.how, gate_up, rows, self.arrived)

    def _out_of(self, down: jax.Array, up: jax.Array, weights: jax.Array) -> jax.Array | TiledArray:
        return out_of_experts(self.how, self.layer.swiglu_limit, down, up, weights, self.arrived)


class ForwardPass(_Pass):
    """The forward pass of one micro-batch: first all `steps`, then `result`."""

    def __init__(self, layer: LayerPass, x: jax.Array) -> None:
        super().__init__(layer)
        self._entering = x
        self._vjps: dict[str, Any] = {}  # by step
        self._shared: jax.Array | None = None
        self._index_loss: jax.Array | None = None

    def steps(self, *, shared: bool = False) -> Steps[None]:
        """All steps up to the last hop of the first round.

        Args:
          shared: whether this work computes the shared experts, beside the first matmul of the
            routed ones. Otherwise they are a work of their own.
        """
        layer, experts = self.layer, self.weights["experts"]
        gate_up, down = experts
        self._entering = x = yield self._entering
        attended = self._step("attend", layer.attend, self.weights["attend"], x)
        x, self._index_loss = yield attended
        self.x = x
        self._gated = gated = self._step("gate", layer.gate, self.weights["gate"], x)
        every_choice = jnp.broadcast_to(layer.kind.routed, gated.chosen.shape)
        exchange = gated.exchange(experts, layer.experts, every_choice)
        sending = self.dispatch.sending(exchange)
        self.arrived = arrived = yield from with_scope("dispatch", sending)
        up = self._into(gate_up, self._rows())
        if shared:
            up, self._shared = yield up, self._beside_experts()
        else:
            up = yield up
        inputs = down, up, arrived.weights
        if self.how.remat.recompute_all:
            out = yield numbers(self._out_of(*inputs))
        else:
            out = yield numbers(self._step("down", self._out_of, *inputs))
        combining = self.dispatch.combining(out, arrived.route)
        self._first, served = yield from with_scope("combine", combining)
        self._exchange = exchange.after(served)

    def shared_steps(self) -> Steps[None]:
        """The shared experts, a step that needs attention alone."""
        self._shared = yield self._beside_experts()

    def result(self) -> tuple[jax.Array, Routing, Residuals]:
        """The layer's output BSD, its routing, and what its backward pass needs.

        Not a step, for overflow rounds may need any number of messages.
        """
        routed, routing = finish(
            self.how, self.layer.swiglu_limit, self._gated.routing, self._exchange, self._first
        )
        out = routed.reshape(self.x.shape)
        out = self.x + (out if self._shared is None else out + self._shared)
        routing = dataclasses.replace(routing, index_loss=self._index_loss)
        return out, routing, self._residuals(routing.traffic.rounds)

    def _residuals(self, rounds: jax.Array) -> Residuals:
        resent = self.layer.resend and self.arrived.slow_hop_words is not None
        without: dict[str, Any] = {"rows" if resent else "slow_hop_words": None}
        arrived = dataclasses.replace(self.arrived, **without)
        x = self._entering if self.layer.recompute_all else self.x
        sent = self._gated.weights, self._gated.chosen
        kept = x, sent, arrived, self._exchange.left, rounds, self._vjps
        return without_weights(self.weights, kept)

    def _beside_experts(self) -> jax.Array | None:
        """Output of the step beside the experts, BSD; None without one."""
        layer, weights = self.layer, self.weights["shared"]
        if weights is None:
            return None
        if layer.recomputes_shared:
            return layer.beside_experts(weights, self.x)
        return self._step("shared", layer.beside_experts, weights, self.x)

    def _step(self, name: str, fn: Any, *inputs: Any) -> Any:
        """fn(*inputs), whose VJP is kept for backward."""
        if self.layer.recompute_all:
            return fn(*inputs)
        out, self._vjps[name] = weight_gradients.vjp(self.how.remat.step(fn), *inputs)
        return out


class BackwardPass(_Pass):
    """The backward pass of one micro-batch: first all `steps`, then `gradients` and `deferred`.

    Attributes:
      d_x: BSD, gradient of the layer's input. Names with d_ are gradients of what they name.
    """

    d_x: jax.Array

    def __init__(
        self, layer: LayerPass, residuals: Residuals, d_out: jax.Array, d_routing: Routing
    ) -> None:
        super().__init__(layer)
        x, self._sent, self.arrived, self._left, self._rounds, self._vjps = with_weights(
            layer.weights, residuals
        )
        self._entering = self.x = x
        self._d_out, self._d_index_loss = d_out, d_routing.index_loss
        self._d_routing = dataclasses.replace(d_routing, index_loss=None)
        self.d_x = d_out
        self._d_shared: Any = None

    def steps(self, *, shared: bool = False) -> Steps[None]:
        """All steps.

        Args:
          shared: whether this work computes the gradients of the shared experts, while those of
            the output travel, and gradients of the routed experts' weights, while those of their
            input travel. Otherwise the former are a work of their own, and the latter are free.
        """
        layer, arrived = self.layer, self.arrived
        if layer.recompute_all:
            self._recompute_attention()
        if layer.recomputes_shared:
            self._vjps["shared"] = _recomputing_vjp(
                layer.beside_experts, self.weights["shared"], self.x
            )
        d_routed = self._d_out.reshape(-1, self._d_out.shape[-1])
        gradient = self.dispatch.combine_gradient(d_routed, arrived.route, arrived.slow_hop_words)
        gradient = with_scope("combine", gradient)
        if shared and self.weights["shared"] is not None:
            late, now = self._split(self._vjps["shared"], self._d_out)
            (travelled, rows), (self._d_shared, d_x) = yield from self._beside(gradient, late, now)
            self.d_x = self.d_x + d_x
        else:
            travelled, rows = yield from gradient
        if rows:
            self.arrived = dataclasses.replace(arrived, rows=rows)
        d_out = self.dispatch.payload.received(travelled, self.x.dtype)
        d_down, d_hidden = self._split(self._down_vjp, d_out)
        d_up, d_weights = yield d_hidden
        d_gate_up, d_rows = self._split(self._gate_up_vjp, d_up)
        d_rows = yield numbers(d_rows)
        gradient_sent = self.dispatch.send_gradient(d_rows, d_weights, arrived.route)
        gradient_sent = with_scope("dispatch", gradient_sent)
        self._d_experts = d_gate_up, d_down
        if shared:
            late = self._d_experts
            d_sent, (self._d_experts, _) = yield from self._beside(gradient_sent, late, None)
        else:
            d_sent = yield from gradient_sent
        d_exchange = self._with_overflow_rounds(d_routed, d_sent)
        self._d_all_rounds = d_exchange.experts
        nothing: Any = np.zeros(self._sent[1].shape, jax.dtypes.float0)
        d_gated = Gated(d_exchange.tokens, d_exchange.weights, nothing, self._d_routing)
        self._d_gate, d_x = self._split(self._vjps["gate"], d_gated)
        late, now = self._split(self._vjps["attend"], (self.d_x + d_x, self._d_index_loss))
        self._d_attend, self.d_x = yield from self._step(late, now)

    def shared_steps(self) -> Steps[None]:
        """The shared experts, a step that needs the output's gradient alone."""
        late, now = self._split(self._vjps["shared"], self._d_out)
        self._d_shared, d_x = yield from self._step(late, now)
        self.d_x = self.d_x + d_x

    def gradients(self) -> dict[str, Any]:
        """Gradients of the weights, as `layer_weights` has them; zeros where they are deferred."""
        return with_zeros_for_deferred(
            self.weights, {**self._first_gradients(), "experts": self._d_all_rounds}
        )

    def deferred(self) -> Residuals:
        """Residuals of which `deferred_gradients` makes the deferred gradients."""
        return without_weights(self.weights, self._first_gradients())

    def _first_gradients(self) -> dict[str, Any]:
        """Gradients of weights, those of the experts from the first round alone."""
        return {
            "attend": self._d_attend,
            "gate": self._d_gate,
            "experts": self._d_experts,
            "shared": self._d_shared,
        }

    def _split(self, vjp: Any, d: Any) -> tuple[Any, Any]:
        """Gradients of weights, deferred if the pass defers them; and those of inputs."""
        return split_backward.split(lambda: vjp(d)) if self.layer.defer else vjp(d)

    def _step(self, late: Any, now: Any) -> Steps[tuple[Any, Any]]:
        """A step of gradients of weights, to which deferred ones do not belong, and others."""
        if self.layer.defer:
            return late, (yield now)
        return (yield late, now)

    def _beside(self, hops: Steps[Any], late: Any, now: Any) -> Steps[tuple[Any, Any]]:
        """`hops`, the last of which ends when `late`, unless it is deferred, and `now` do."""
        last = hops_of(self.how)
        if self.layer.defer:
            arrived, now = yield from beside(hops, last, now)
            return arrived, (late, now)
        return (yield from beside(hops, last, (late, now)))

    def _recompute_attention(self) -> None:
        """Attention from the layer's input, and the VJPs of the steps that read its output."""
        layer, weights = self.layer, self.weights
        attention = remat.REPORT.step(layer.attend)
        (self.x, _), vjp = weight_gradients.vjp(attention, weights["attend"], self._entering)
        chosen = functools.partial(layer.gate, chosen=self._sent[1])
        self._vjps = {"attend": vjp, "gate": _recomputing_vjp(chosen, weights["gate"], self.x)}

    def _gate_up_vjp(self, d_up: jax.Array) -> Any:
        gate_up, _ = self.weights["experts"]
        return weight_gradients.vjp(self._into, gate_up, self._rows())[1](d_up)

    def _down_vjp(self, d_out: jax.Array | TiledArray) -> Any:
        if "down" in self._vjps:
            d_down, *d_hidden = self._vjps["down"](d_out)
        else:
            gate_up, down = self.weights["experts"]
            up = self._into(gate_up, self._rows())
            vjp = weight_gradients.vjp(self._out_of, down, up, self.arrived.weights)[1]
            d_down, *d_hidden = vjp(d_out)
        return d_down, d_hidden

    def _with_overflow_rounds(
        self, d_routed: jax.Array, d_sent: tuple[jax.Array, jax.Array]
    ) -> Exchange:
        """Gradients of the exchange, given those of the first round's tokens and weights."""
        layer, experts = self.layer, self.weights["experts"]
        norm, _ = self.weights["gate"]
        tokens = axes.fan_out(norm(self.x).reshape(d_routed.shape), "expert_width")
        weights, chosen = self._sent
        exchange = Exchange(tokens, weights, chosen, self._left, layer.experts, experts)
        d_experts = with_zeros_for_deferred(experts, self._d_experts)
        first = cotangent(layer.experts, *d_sent, d_experts)
        rounds = expert_rounds(self.how, layer.swiglu_limit)
        return rounds.rest_gradient(exchange, self._rounds, d_routed, first)


def _recomputing_vjp(fn: Any, weights: Any, x: jax.Array) -> Any:
    """VJP of fn(weights, x) that recomputes fn when it is called."""
    return lambda d: weight_gradients.vjp(fn, weights, x)[1](d)
