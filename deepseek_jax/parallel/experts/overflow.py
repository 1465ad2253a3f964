"""Further rounds of an exchange, for the choices that its buffers had no room for.

The first round is unconditional and made of separate steps, so that its messages can travel under
other work. Whether another is needed is one number that is the same on the whole expert group, so
that no device waits for one that is not coming. A balanced router needs none.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel import axes
from deepseek_jax.parallel.experts.dispatch import Dispatch, Received
from deepseek_jax.precision.saved import Saved, save

# (the experts' weights, what arrived) -> SD, each row through its expert, times its routing weight
Work = Callable[[Any, Received], jax.Array]


def complete(
    dispatch: Dispatch,
    work: Work,
    experts: Any,
    tokens: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    total: int,
    first: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The sum over all choices, from the first round's sum and what it served.

    Args:
      experts: a pytree, differentiated; what `work` needs of the local experts.
      tokens, weights, chosen, total: what the first round was sent.
      first: what `combine` returned for it.

    Returns:
      MD, and the number of rounds () float32.
    """
    out, served = first
    count, top_k = chosen.shape
    if dispatch.complete(count, top_k, total):
        return out, jnp.ones(())
    left = save(Saved.ROUTE, ~served)
    more, rounds = _further(dispatch, work, total, experts, tokens, weights, chosen, left, out)
    return more, 1.0 + rounds


def complete_gradient(
    dispatch: Dispatch,
    work: Work,
    experts: Any,
    tokens: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    total: int,
    served: jax.Array,
    rounds: jax.Array,
    d_out: jax.Array,
    first: tuple[Any, jax.Array, jax.Array],
) -> tuple[Any, jax.Array, jax.Array]:
    """The gradients of experts, tokens and weights: the first round's, and what others add.

    Args:
      served: what the first round's `combine` returned.
      rounds: what `complete` returned. To ask all devices again would be one more message, which
        XLA makes one with that of whatever else runs at the time, and so has both wait.
    """
    count, top_k = chosen.shape
    if dispatch.complete(count, top_k, total):
        return first
    saved = experts, tokens, weights, chosen, ~served, rounds > 1
    return _further_gradients(dispatch, work, total, saved, d_out, first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _further(dispatch, work, total, experts, tokens, weights, chosen, left, out):
    """Adds rounds to `out` until nothing is left on any device of the expert group.

    Every round serves at least one choice that is left: the first copy of a lane always has a slot.
    Nothing is kept for backward, which walks the same rounds again, each with its own backward: so
    memory does not grow with their number.
    """

    def one(state):
        _, left, out, rounds = state
        more, served = _round(dispatch, work, total, experts, tokens, weights, chosen, left)
        left = left & ~served
        return _any(left), left, out + _wide(more), rounds + 1.0

    start = _any(left), left, _wide(out), jnp.zeros(())
    total, rounds = lax.while_loop(lambda state: state[0], one, start)[2:]
    return total.astype(out.dtype), rounds


def _further_forward(dispatch, work, total, experts, tokens, weights, chosen, left, out):
    done = _further(dispatch, work, total, experts, tokens, weights, chosen, left, out)
    return done, (experts, tokens, weights, chosen, left, done[1] > 0)


def _further_backward(dispatch, work, total, saved, cotangents):
    zeros = jax.tree.map(jnp.zeros_like, saved[:3])
    gradients = _further_gradients(dispatch, work, total, saved, cotangents[0], zeros)
    return *gradients, None, None, cotangents[0]


def _further_gradients(dispatch, work, total, saved, d_out, first):
    experts, tokens, weights, chosen, left, more = saved

    def one(state):
        _, left, gradients = state

        def through(experts, tokens, weights):
            return _round(dispatch, work, total, experts, tokens, weights, chosen, left)

        _, pull, served = jax.vjp(through, experts, tokens, weights, has_aux=True)
        left = left & ~served
        return _any(left), left, jax.tree.map(jnp.add, gradients, _wide(pull(d_out)))

    totals = lax.while_loop(lambda state: state[0], one, (more, left, _wide(first)))[2]
    return jax.tree.map(lambda total, like: total.astype(like.dtype), totals, first)


_further.defvjp(_further_forward, _further_backward)


def _round(dispatch, work, total, experts, tokens, weights, chosen, left):
    arrived = dispatch.send(tokens, weights, chosen, left, total)
    return dispatch.combine(work(experts, arrived), arrived.route)


def _wide(tree: Any) -> Any:
    """What rounds add up: float32, rounded once at the end."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _any(left: jax.Array) -> jax.Array:
    """Whether any device of the expert group has choices left: equal on all of them."""
    return axes.anywhere(left.any(), "experts")
