"""TWO"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.execution import Execution
from deepseek_jax.model.overlapped.layer_pass import LayerPass, hops_of
from deepseek_jax.model.router import Routing, joined
from deepseek_jax.parallel.overlap import interleave, side_by_side, with_scope

MICRO_BATCHES = "ab"  # in capitals: their shared experts


def forward_turns(hops: int, shared: str) -> list[str]:
    """Who does a step in which turn: a letter for each step. `shared` is AB or nothing."""
    a, b = "a" * hops, "b" * hops
    return [
        "aab",
        *side_by_side("b", a),
        *side_by_side("aa", b),
        *side_by_side("bb", a),
        *side_by_side(shared, b),
    ]


def backward_turns(hops: int, shared: str) -> list[str]:
    """Steps of each turn of backward, as in `forward_turns`."""
    a, b = "a" * hops, "b" * hops
    return [
        *side_by_side(shared[::-1], b),
        *side_by_side("bb", a),
        *side_by_side("aa", b),
        *side_by_side("b", a),
        "a",
    ]


def layer(block: Any, x: jax.Array, how: Execution) -> tuple[jax.Array, Routing]:
    """A MoE `Block` on two micro-batches, which stand one after another in the batch of x BSD.

    Raises:
      ValueError: the block has redundant experts, which are for serving.
    """
    feed = block.feed
    if feed.slots is not None:
        raise ValueError("redundant experts serve one micro-batch at a time: run with in_flight=1")
    weights = {
        "attend": (block.attention_norm, block.attention),
        "gate": (block.feed_norm, feed.router),
        "experts": feed.experts.weights(),
        "shared": (block.feed_norm, feed.shared) if feed.config.shared_experts else None,
    }
    parts = tuple(jnp.split(x, len(MICRO_BATCHES)))
    done = _layer(how, feed.config.experts, weights, parts)
    return jnp.concatenate([x for x, _ in done]), joined([routing for _, routing in done])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _layer(how, experts, weights, xs):
    return _layer_forward(how, experts, weights, xs)[0]


def _layer_forward(how, experts, weights, xs):
    flights = {name: LayerPass(how, experts, weights) for name in MICRO_BATCHES}
    works = {name: flights[name].forward(x) for name, x in zip(MICRO_BATCHES, xs, strict=True)}
    shared = MICRO_BATCHES.upper() if weights["shared"] is not None else ""
    works |= {name: flights[name.lower()].shared_forward() for name in shared}
    works = {name: with_scope(f"pass_{name}", work) for name, work in works.items()}
    interleave(works, forward_turns(hops_of(how), shared))
    done = tuple(flight.result() for flight in flights.values())
    return done, (weights, [flight.kept() for flight in flights.values()])


def _layer_backward(how, experts, saved, cotangents):
    weights, kept = saved
    flights = {
        name: LayerPass(how, experts, weights).restore(*both)
        for name, *both in zip(MICRO_BATCHES, kept, cotangents, strict=True)
    }
    works = {name: flight.backward() for name, flight in flights.items()}
    shared = MICRO_BATCHES.upper() if weights["shared"] is not None else ""
    works |= {name: flights[name.lower()].shared_backward() for name in shared}
    works = {name: with_scope(f"pass_{name}", work) for name, work in works.items()}
    interleave(works, backward_turns(hops_of(how), shared))
    gradients = jax.tree.map(jnp.add, *(flight.gradients() for flight in flights.values()))
    return gradients, tuple(flight.d_x for flight in flights.values())


_layer.defvjp(_layer_forward, _layer_backward)
