"""Next-token and MTP cross entropy (equations 23 to 25), in chunks of rows.

MTP memory is O(V + D) for a row of the current chunk (its logits and its gradient) and O(D) for any
other row, where logits of all n heads at once would take O(n V + D) per token. The loss ends the
graph, so the gradients of the hidden states (M D numbers) and of the head (D V) are made in the
same pass and saved, and no logits are made twice.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel import axes
from deepseek_jax.precision.einsum import exact_einsum, row_product


@jax.named_scope("loss")
def head_loss(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the cross entropies of all rows, and each of them.

    Args:
      hidden: MD, inputs of the head, in the recipe's dtype.
      head: DV, this device's shard of the vocabulary.
      targets: M int32, indices into the whole vocabulary.
      weights: M float32, weight of each row in the sum; 0 excludes it.
      chunk: number of rows whose logits exist at once.

    Returns:
      () float32 sum of weights * entropies, differentiable in `hidden` and `head`; and the
      entropies M float32, in nats, as a metric without gradient.
    """
    chex.assert_shape(hidden, (None, head.shape[0]), custom_message="hidden: MD, head: DV")
    chex.assert_shape([targets, weights], hidden.shape[:1], custom_message="targets, weights: M")
    chex.assert_type([targets, weights], [int, jnp.float32])
    rows = hidden.shape[0]
    padding = -rows % chunk
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    targets, weights = (jnp.pad(part, (0, padding)) for part in (targets, weights))
    total, entropies = _head_loss(hidden, head, targets, weights, chunk)
    return total, lax.stop_gradient(entropies[:rows])


def everywhere(*rows: jax.Array) -> tuple[jax.Array, ...]:
    """Rows of all devices that share a sharded vocabulary and hold different tokens, gathered."""
    return tuple(axes.fan_out(each, "vocab") for each in rows)


def logits_of(rows: jax.Array, head: jax.Array) -> jax.Array:
    """Logits of rows MD, MV float32."""
    return exact_einsum("MD,DV->MV", rows, head)


class Scored(NamedTuple):
    """Softmax of some rows, each part M: l and m give it back as exp(logits - m) / l.

    Attributes:
      entropy: Cross entropy, in nats.
      largest: The largest logit m.
      normaliser: l, the sum of exp(logits - m) over the whole vocabulary.
      column: Column of the target in this device's shard; outside [0, V) if it is in another.
    """

    entropy: jax.Array
    largest: jax.Array
    normaliser: jax.Array
    column: jax.Array


def entropy_of(logits: jax.Array, targets: jax.Array) -> Scored:
    """Cross entropy of logits MV, this device's shard, with targets M in the whole vocabulary."""
    over, width = axes.names("vocab"), logits.shape[-1]
    here = targets - width * axes.index("vocab")
    largest = logits.max(-1)
    largest = lax.pmax(largest, over) if over else largest
    normaliser = jnp.exp(logits - largest[:, None]).sum(-1)
    column = jnp.clip(here, 0, width - 1)[:, None]
    target = jnp.take_along_axis(logits, column, axis=1, mode="promise_in_bounds")[:, 0]
    if over:
        target = jnp.where((here >= 0) & (here < width), target, 0.0)
        normaliser, target = lax.psum((normaliser, target), over)
    return Scored(jnp.log(normaliser) + largest - target, largest, normaliser, here)


def gradients_of(
    rows: jax.Array,
    head: jax.Array,
    logits: jax.Array,
    scored: Scored,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the weighted sum of entropies: of the rows MD, and of the head DV.

    That of the rows must be summed over the shards of the vocabulary.

    Args:
      scored: result of `entropy_of` for these logits.
    """
    hit = scored.column[:, None] == jnp.arange(logits.shape[-1])[None]
    # weights * (softmax - hit), by the same exponentials as in `entropy_of`: XLA can keep them.
    exps = jnp.exp(logits - scored.largest[:, None])
    weighted = exps * (weights / scored.normaliser)[:, None]
    d_logits = (weighted - jnp.where(hit, weights[:, None], 0.0)).astype(head.dtype)
    d_rows = exact_einsum("MV,DV->MD", d_logits, head)
    return d_rows, row_product("MD,MV->DV", rows, d_logits)


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(array.reshape(-1, chunk, *array.shape[1:]) for array in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _head_loss(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    def one(_: None, part: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        rows, target = everywhere(*part)
        return None, axes.own(entropy_of(logits_of(rows, head), target).entropy, "vocab")

    _, entropies = lax.scan(one, None, _chunks(chunk, hidden, targets))
    entropies = entropies.reshape(-1)
    return jnp.sum(entropies * weights), entropies


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """Result of `_head_loss`, and the gradients of hidden states and head at cotangent 1."""

    def one(d_head: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        rows, target, weight = everywhere(*part)
        logits = logits_of(rows, head)
        scored = entropy_of(logits, target)
        d_rows, more = gradients_of(rows, head, logits, scored, weight)
        d_rows = axes.fan_in(d_rows, "vocab").astype(hidden.dtype)
        return d_head + more, (axes.own(scored.entropy, "vocab"), d_rows)

    start = jnp.zeros(head.shape, jnp.float32)
    parts = _chunks(chunk, hidden, targets, weights)
    d_head, (entropies, d_hidden) = lax.scan(one, start, parts)
    entropies = entropies.reshape(-1)
    saved = d_hidden.reshape(hidden.shape), d_head.astype(head.dtype)
    return (jnp.sum(entropies * weights), entropies), saved


def _backward(
    chunk: int, saved: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    d_hidden, d_head = saved
    scale = cotangents[0]
    return (
        (d_hidden * scale).astype(d_hidden.dtype),
        (d_head * scale).astype(d_head.dtype),
        None,
        None,
    )


_head_loss.defvjp(_forward, _backward)
