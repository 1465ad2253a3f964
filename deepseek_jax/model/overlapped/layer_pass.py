"""Two micro-batches in one MoE layer: the work of one under the messages of the other.

Forward and backward go in steps (attention, a hop, a matmul of the experts), and a table of turns
says which stand side by side: here those of forward, with two hops. Backward mirrors it. What a
step computes is what a `Block` computes; only the order is told here.

    turn       1          2         3      4      5     6       7         8
    a      attention   hop, hop  gate_up  down   hop   hop   shared
    b                 attention    hop    hop  gate_up down    hop   hop, shared

Two entries of a column need nothing of one another, so a message can travel under matmuls.
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
from deepseek_jax.parallel.overlap import Steps, with_scope
from deepseek_jax.parallel.pipeline import split_backward


def stepped(how: Execution) -> SteppedDispatch:
    """The dispatch with a step for each hop."""
    dispatch = how.dispatch.in_steps
    assert dispatch is not None  # by the rules of `config`
    return dispatch


def hops_of(how: Execution) -> int:
    """Number of all-to-alls that take a token to its experts."""
    return len(stepped(how).hop_axes())


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What a block is, where it may be known to a device only while it runs.

    Attributes:
      routed: () bool, whether tokens go to experts at all.
      dense: () bool, whether the wide network stands in for the shared experts.
    """

    routed: Any
    dense: Any


class LayerPass:
    """One micro-batch on its way through a block: what later steps need of earlier ones.

    Attributes:
      entering, x: BSD, before and after attention.
      gated, sent: what the gate made of it; routing weights and experts, (BS)K each.
      arrived: what came to the experts that are here, as it travels.
      summed: (BS)D, the first round's sum.
      left: (BS)K bool, choices that the first round did not serve.
      rounds: () float32, how many it took until all were served.
      pulls: of each step, from its result's cotangent to those of its arguments.
    """

    entering: jax.Array
    x: jax.Array
    gated: Gated
    sent: tuple[jax.Array, jax.Array]
    arrived: Received
    exchange: Exchange
    summed: jax.Array
    left: jax.Array
    rounds: jax.Array
    d_out: jax.Array
    d_routing: Routing

    def __init__(
        self,
        how: Execution,
        experts: int,
        weights: Any,
        kind: LayerKind | None = None,
        defer: bool = False,
        recompute_all: bool = False,
    ) -> None:
        """One that has nothing behind it yet.

        Args:
          defer: leave the weights' gradients to `rest_of_gradients`.
          again: keep what entered and what crossed the slow network, and no more: backward begins
            with attention, and has the fast hop bring the tokens beside their gradients.
        """
        self.how, self.dispatch, self.experts, self.weights = how, stepped(how), experts, weights
        self.kind = kind or LayerKind(routed=np.True_, dense=np.False_)
        self.defer, self.recompute_all = defer, recompute_all
        self.pulls: dict[str, Any] = {}
        self.shared = self.d_shared = None

    def kept(self) -> "Residuals":
        """What backward needs beside the weights."""
        resent = self.recompute_all and self.arrived.passed is not None
        without: dict[str, Any] = {"rows" if resent else "passed": None}
        arrived = dataclasses.replace(self.arrived, **without)
        x = self.entering if self.recompute_all else self.x
        kept = x, self.sent, arrived, self.left, self.rounds, self.pulls
        return without_weights(self.weights, kept)

    def restore(self, kept: "Residuals", cotangent: tuple[jax.Array, Routing]) -> "LayerPass":
        """Ready for the way back."""
        x, self.sent, self.arrived, self.left, self.rounds, self.pulls = with_weights(
            self.weights, kept
        )
        self.entering = self.x = x
        self.d_out, self.d_routing = cotangent
        self.d_x = self.d_out
        return self

    # Forward.

    def forward(self, x: jax.Array, *, shared: bool = False) -> Steps[None]:
        """Up to what comes home.

        Args:
          shared: whether the shared experts are a step of this work, and not one of their own.
        """
        how, experts = self.how, self.weights["experts"]
        gate_up, down = experts
        self.entering = x = yield x
        self.x = x = yield self._step("attend", self._attend, self.weights["attend"], x)
        gated = self._step("gate", self._gate, self.weights["gate"], x)
        self.gated, self.sent = gated, (gated.weights, gated.chosen)
        every_choice = jnp.broadcast_to(self.kind.routed, gated.chosen.shape)
        exchange = gated.exchange(experts, self.experts, every_choice)
        sending = self.dispatch.sending(exchange)
        self.arrived = arrived = yield from with_scope("dispatch", sending)
        if shared:
            yield from self.shared_forward()
        up = yield self._into(gate_up, self._rows())
        inputs = down, up, arrived.weights
        if how.remat.recompute_all:
            out = yield self._out_of(*inputs)
        else:
            out = yield self._step("down", self._out_of, *inputs)
        combining = self.dispatch.combining(out, arrived.route)
        self.summed, served = yield from with_scope("combine", combining)
        self.exchange = exchange.after(served)
        self.left = self.exchange.left

    def shared_forward(self) -> Steps[None]:
        self.shared = yield self._step("shared", self._beside, self.weights["shared"], self.x)

    def result(self) -> tuple[jax.Array, Routing]:
        """After all turns, for further rounds may need any number of messages."""
        routed, routing = finish(self.how, self.gated.routing, self.exchange, self.summed)
        out, self.rounds = routed.reshape(self.x.shape), routing.traffic.rounds
        return self.x + (out if self.shared is None else out + self.shared), routing

    # Backward: d_x is the cotangent of x, and d_ that of others.

    def backward(self, *, shared: bool = False) -> Steps[None]:
        arrived = self.arrived
        if self.recompute_all:
            self._recompute_attention()
        d_home = self.d_out.reshape(-1, self.d_out.shape[-1])
        gradient = self.dispatch.combine_gradient(d_home, arrived.route, arrived.passed)
        travelled, rows = yield from with_scope("combine", gradient)
        if rows:
            self.arrived = dataclasses.replace(arrived, rows=rows)
        d_out = self.dispatch.payload.decode(travelled, self.x.dtype)
        # No step waits for the weights' gradients: they are work for wherever there is none.
        d_down, d_hidden = self._apart(self._pull_down, d_out)
        d_up, d_weights = yield d_hidden
        d_gate_up, d_rows = self._apart(self._pull_into, d_up)
        d_rows = yield d_rows
        gradient_sent = self.dispatch.send_gradient(d_rows, d_weights, arrived.route)
        d_sent = yield from with_scope("dispatch", gradient_sent)
        self.d_experts = d_gate_up, d_down
        first = cotangent(
            self.experts, *d_sent, with_zeros_for_deferred(self.weights["experts"], self.d_experts)
        )
        d_exchange = self._with_overflow_rounds(d_home, first)
        self.d_rounds = d_exchange.experts
        nothing: Any = np.zeros(self.sent[1].shape, jax.dtypes.float0)
        d_gated = Gated(d_exchange.tokens, d_exchange.weights, nothing, self.d_routing)
        self.d_gate, d_x = self._apart(self.pulls["gate"], d_gated)
        if shared:
            yield from self.shared_backward()
        self.d_attend, self.d_x = yield from self._fenced(self.pulls["attend"], self.d_x + d_x)

    def shared_backward(self) -> Steps[None]:
        self.d_shared, d_x = yield from self._fenced(self.pulls["shared"], self.d_out)
        self.d_x = self.d_x + d_x

    def gradients(self) -> dict[str, Any]:
        """Of the weights; zeros for those that are missing yet."""
        return with_zeros_for_deferred(
            self.weights, {**self._all_gradients(), "experts": self.d_rounds}
        )

    def deferred(self) -> "Residuals":
        """What `rest_of_gradients` makes the others of."""
        return without_weights(self.weights, self._all_gradients())

    def _all_gradients(self) -> dict[str, Any]:
        return {
            "attend": self.d_attend,
            "gate": self.d_gate,
            "experts": self.d_experts,
            "shared": self.d_shared,
        }

    def _apart(self, pull: Any, cotangent: Any) -> tuple[Any, Any]:
        """The gradients of weights, or what makes them later; and those of the inputs."""
        return split_backward.split(lambda: pull(cotangent)) if self.defer else pull(cotangent)

    def _fenced(self, pull: Any, cotangent: Any) -> Steps[tuple[Any, Any]]:
        """The same as a step; what is left for later belongs to none."""
        late, now = self._apart(pull, cotangent)
        if self.defer:
            return late, (yield now)
        return (yield late, now)

    def _recompute_attention(self) -> None:
        """What attention made of what entered, and how to pull through what reads it."""
        self.pulls = {}
        attention = remat.REPORT.step(self._attend)
        both = self.weights["attend"]
        self.x, self.pulls["attend"] = jax.vjp(attention, both, self.entering)
        chosen = functools.partial(self._gate, chosen=self.sent[1])
        self.pulls["gate"] = _pull(chosen, self.weights["gate"], self.x)
        if self.weights["shared"] is not None:
            self.pulls["shared"] = _pull(self._beside, self.weights["shared"], self.x)

    def _pull_into(self, d_up: jax.Array) -> Any:
        gate_up, _ = self.weights["experts"]
        return jax.vjp(self._into, gate_up, self._rows())[1](d_up)

    def _pull_down(self, d_out: jax.Array) -> Any:
        if "down" in self.pulls:
            d_down, *d_hidden = self.pulls["down"](d_out)
        else:
            gate_up, down = self.weights["experts"]
            up = self._into(gate_up, self._rows())
            pull = jax.vjp(self._out_of, down, up, self.arrived.weights)[1]
            d_down, *d_hidden = pull(d_out)
        return d_down, d_hidden

    def _with_overflow_rounds(self, d_home: jax.Array, first: Exchange) -> Exchange:
        norm, _ = self.weights["gate"]
        tokens = axes.fan_out(norm(self.x).reshape(d_home.shape), "expert_width")
        weights, chosen = self.sent
        exchange = Exchange(
            tokens, weights, chosen, self.left, self.experts, self.weights["experts"]
        )
        return expert_rounds(self.how).rest_gradient(exchange, self.rounds, d_home, first)

    def _rows(self) -> jax.Array:
        rows: Any = self.arrived.rows  # as they travel
        return self.dispatch.payload.decode(rows, self.x.dtype)

    def _into(self, gate_up: jax.Array, rows: jax.Array) -> jax.Array:
        return into_experts(self.how, gate_up, rows, self.arrived)

    def _out_of(self, down: jax.Array, up: jax.Array, weights: jax.Array) -> jax.Array:
        return out_of_experts(self.how, down, up, weights, self.arrived)

    def _attend(self, weights: Any, x: jax.Array) -> jax.Array:
        norm, attention = weights
        return attend(norm, attention, x, self.how)

    def _gate(self, weights: Any, x: jax.Array, chosen: jax.Array | None = None) -> Gated:
        norm, router = weights
        return gate(router, norm(x), chosen)

    def _beside(self, weights: Any, x: jax.Array) -> jax.Array:
        """What every token goes through: the shared experts, or a dense layer's wide network."""
        norm, shared, *dense = weights
        x = norm(x)
        if not dense:
            return shared(x, self.how)
        narrow = (lambda x: shared(x, self.how)) if shared is not None else jnp.zeros_like
        return jax.lax.cond(self.kind.dense, lambda x: dense[0](x, self.how), narrow, x)

    def _step(self, name: str, fn: Any, *inputs: Any) -> Any:
        """fn(*inputs), which backward can pull a cotangent through."""
        if self.recompute_all:
            return fn(*inputs)
        out, self.pulls[name] = jax.vjp(self.how.remat.step(fn), *inputs)
        return out


def _pull(fn: Any, weights: Any, x: jax.Array) -> Any:
    """From the cotangent of fn(weights, x), which is made again for it, to those of both."""
    return lambda cotangent: jax.vjp(fn, weights, x)[1](cotangent)
