"""Overflow rounds: no choice is dropped, whatever the capacity factor.

The first round is unconditional and made of separate steps, so that its messages can travel under
other work. Further rounds serve the choices that its buffers had no room for. Whether one is needed
is a number that is equal on the whole expert-parallel group, so that no device waits for a message
that no device sends. A balanced router needs none.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel import axes
from deepseek_jax.parallel.experts.exchange import Dispatch, Exchange, Received, cotangent
from deepseek_jax.precision import weight_gradients
from deepseek_jax.precision.linear_input import TiledArray

# (the experts' weights, rows) -> SD, each row through its expert, times its routing weight
Work = Callable[[Any, Received], jax.Array | TiledArray]


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Rounds of an exchange, each of them dispatch, experts, combine.

    Attributes:
      dispatch: transport of tokens to their experts.
      work: the experts.
    """

    dispatch: Dispatch
    work: Work

    def one(self, exchange: Exchange) -> tuple[jax.Array, jax.Array]:
        """The sum MD over the choices that one round serves; and MK bool, which choices these are.

        Every round serves at least one choice that is left: the first copy of a lane has a slot.
        """
        with jax.named_scope("dispatch"):
            received = self.dispatch.send(exchange)
        out = self.work(exchange.experts, received)
        with jax.named_scope("combine"):
            return self.dispatch.combine(out, received.route)

    @jax.named_scope("overflow_rounds")
    def rest(self, exchange: Exchange, out: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Overflow rounds until no choice is left.

        Args:
          exchange: after the first round.
          out: MD, the first round's sum.

        Returns:
          MD, the sum over all choices; and () float32, the number of rounds with the first one.
        """
        if self._never_overflows(exchange):
            return out, jnp.ones(())
        more, rounds = _overflow_rounds(self, exchange, out)
        return more, 1.0 + rounds

    @jax.named_scope("overflow_rounds")
    def rest_gradient(
        self, exchange: Exchange, rounds: jax.Array, d_out: jax.Array, first: Exchange
    ) -> Exchange:
        """Gradients of an exchange: those of the first round, and what overflow rounds add.

        Args:
          exchange: after the first round.
          rounds: number of rounds that `rest` returned. Asking all devices again would be one more
            message, which XLA fuses with another one that is due at the time, so that both wait.
          d_out: MD.
          first: gradients of the first round.
        """
        if self._never_overflows(exchange):
            return first
        return _overflow_rounds_gradients(self, exchange, rounds > 1, d_out, first)

    def _never_overflows(self, exchange: Exchange) -> bool:
        count, top_k = exchange.chosen.shape
        return self.dispatch.complete(count, top_k, exchange.total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _overflow_rounds(
    rounds: Rounds, exchange: Exchange, out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adds rounds to `out` until nothing is left on any device of the expert-parallel group.

    No round saves anything for backward, which runs the same rounds again, each with its own
    backward: so memory does not grow with their number.
    """

    def one(state: Any) -> Any:
        _, left, out, number = state
        more, served = rounds.one(dataclasses.replace(exchange, left=left))
        left = left & ~served
        return _any(left), left, out + _wide(more), number + 1.0

    start = _any(exchange.left), exchange.left, _wide(out), jnp.zeros(())
    total, number = lax.while_loop(lambda state: state[0], one, start)[2:]
    return total.astype(out.dtype), number


def _overflow_rounds_forward(rounds: Rounds, exchange: Exchange, out: jax.Array) -> tuple[Any, Any]:
    done = _overflow_rounds(rounds, exchange, out)
    experts = weight_gradients.without_carriers(exchange.experts)
    return done, (dataclasses.replace(exchange, experts=experts), done[1] > 0)


def _overflow_rounds_backward(
    rounds: Rounds, saved: Any, cotangents: Any
) -> tuple[Exchange, jax.Array]:
    exchange, more = saved
    experts = weight_gradients.carriers(exchange.experts)
    zeros = jax.tree.map(
        jnp.zeros_like, cotangent(exchange.total, exchange.tokens, exchange.weights, experts)
    )
    done = _overflow_rounds_gradients(rounds, exchange, more, cotangents[0], zeros)
    d_experts = weight_gradients.cotangents(exchange.experts, done.experts)
    return dataclasses.replace(done, experts=d_experts), cotangents[0]


_overflow_rounds.defvjp(_overflow_rounds_forward, _overflow_rounds_backward)


def _overflow_rounds_gradients(
    rounds: Rounds, exchange: Exchange, more: jax.Array, d_out: jax.Array, first: Exchange
) -> Exchange:
    """`first` and the gradients of overflow rounds, if there are any."""

    def one(state: Any) -> Any:
        _, left, gradients = state

        def through(experts: Any, tokens: jax.Array, weights: jax.Array) -> Any:
            given = Exchange(tokens, weights, exchange.chosen, left, exchange.total, experts)
            return rounds.one(given)

        given = exchange.experts, exchange.tokens, exchange.weights
        _, vjp, served = weight_gradients.vjp(through, *given, has_aux=True)
        d_experts, d_tokens, d_weights = vjp(d_out)
        each = cotangent(exchange.total, d_tokens, d_weights, d_experts)
        left = left & ~served
        return _any(left), left, jax.tree.map(jnp.add, gradients, _wide(each))

    start = more, exchange.left, _wide(first)
    totals = lax.while_loop(lambda state: state[0], one, start)[2]
    return jax.tree.map(lambda total, like: total.astype(like.dtype), totals, first)


def _wide(tree: Any) -> Any:
    """The same numbers in float32, in which rounds are summed; the sum is rounded once."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _any(left: jax.Array) -> jax.Array:
    """Whether any device of the expert-parallel group has choices left: equal on all of them."""
    return axes.anywhere(left.any(), "experts")
