"""A MoE layer on two micro-batches: the messages of one under the matmuls of the other."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.execution import Execution
from deepseek_jax.model.overlapped.layer_modules import block_modules, layer_weights
from deepseek_jax.model.overlapped.layer_pass import LayerPass, hops_of
from deepseek_jax.model.router import Routing, joined
from deepseek_jax.parallel.overlap import interleave, side_by_side, with_scope
from deepseek_jax.precision import weight_gradients

MICRO_BATCHES = "ab"  # in capitals: their shared experts


def forward_turns(hops: int, shared: str) -> list[str]:
    """The turns of forward, a letter for each step that a work does in a turn.

    Args:
      hops: all-to-alls on the way to the experts.
      shared: "AB" for shared experts, "" without any.
    """
    a, b = "a" * hops, "b" * hops
    return [
        "aab",
        *side_by_side("b", a),
        *side_by_side("aa", b),
        *side_by_side("bb", a),
        *side_by_side(shared, b),
    ]


def backward_turns(hops: int, shared: str) -> list[str]:
    """The turns of backward, which mirror those of forward.

    With two hops, each entry the gradient of the step that it names:

        turn       1           2       3       4       5       6         7          8
        a                   shared    hop     hop     down  gate_up  hop, hop  attention
        b      hop, shared    hop     down  gate_up   hop     hop    attention
    """
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
    weights = layer_weights(block_modules(block))
    parts = tuple(jnp.split(x, len(MICRO_BATCHES)))
    done = _layer(how, feed.config.experts, weights, parts)
    return jnp.concatenate([x for x, _ in done]), joined([routing for _, routing in done])


Parts = tuple[jax.Array, ...]  # BSD of each micro-batch
Done = tuple[tuple[jax.Array, Routing], ...]  # output and routing of each


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _layer(how: Execution, experts: int, weights: dict[str, Any], parts: Parts) -> Done:
    return _layer_forward(how, experts, weights, parts)[0]


def _layer_forward(
    how: Execution, experts: int, weights: dict[str, Any], parts: Parts
) -> tuple[Done, Any]:
    weights = weight_gradients.without_carriers(weights)
    layer = LayerPass(how, experts, weights)
    each = {name: layer.forward(x) for name, x in zip(MICRO_BATCHES, parts, strict=True)}
    works = {name: one.steps() for name, one in each.items()}
    shared = _shared(weights)
    works |= {name: each[name.lower()].shared_steps() for name in shared}
    works = {name: with_scope(f"pass_{name}", work) for name, work in works.items()}
    interleave(works, forward_turns(hops_of(how), shared))
    results = [one.result() for one in each.values()]
    done = tuple((x, routing) for x, routing, _ in results)
    return done, (weights, [residuals for *_, residuals in results])


def _layer_backward(
    how: Execution, experts: int, saved: Any, cotangents: Done
) -> tuple[Any, Parts]:
    weights, residuals = saved
    layer = LayerPass(how, experts, weights)
    each = {
        name: layer.backward(kept, *gradients)
        for name, kept, gradients in zip(MICRO_BATCHES, residuals, cotangents, strict=True)
    }
    works = {name: one.steps() for name, one in each.items()}
    shared = _shared(weights)
    works |= {name: each[name.lower()].shared_steps() for name in shared}
    works = {name: with_scope(f"pass_{name}", work) for name, work in works.items()}
    interleave(works, backward_turns(hops_of(how), shared))
    gradients = jax.tree.map(jnp.add, *(one.gradients() for one in each.values()))
    return weight_gradients.cotangents(weights, gradients), tuple(one.d_x for one in each.values())


_layer.defvjp(_layer_forward, _layer_backward)


def _shared(weights: dict[str, Any]) -> str:
    """The works that are shared experts."""
    return MICRO_BATCHES.upper() if weights["shared"] is not None else ""
