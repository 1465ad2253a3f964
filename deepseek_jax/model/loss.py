"""What training minimises: next-token and MTP cross entropy (equations 23 to 25), in chunks.

The vocabulary times tokens is never held: logits exist for one chunk of one head at a time, forward
and backward. The loss is the end of the graph, so its gradient with respect to the hidden states
and the head is made in the same pass and kept (M + D V numbers), and no logits are made twice.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel import axes
from deepseek_jax.precision.einsum import exact_einsum, row_product


@jax.named_scope("loss")
def head_loss(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of every row, and their weighted sum.

    Args:
      hidden: MD, what the head reads, in the recipe's dtype.
      head: DV, this device's part of the vocabulary.
      targets: M int32 over the whole vocabulary.
      weights: M float32, what each row counts in the sum; 0 leaves it out.
      chunk: rows whose logits are held at once.

    Returns:
      () float32 sum of weights * entropies, differentiable in `hidden` and `head`; and the
      entropies M float32, in nats, for the record: no gradient flows through them.
    """
    rows = hidden.shape[0]
    padding = -rows % chunk
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    targets, weights = (jnp.pad(part, (0, padding)) for part in (targets, weights))
    total, entropies = _head_loss(hidden, head, targets, weights, chunk)
    return total, lax.stop_gradient(entropies[:rows])


def everywhere(*rows: jax.Array) -> tuple[jax.Array, ...]:
    """Rows of all devices that share a vocabulary and see different tokens, gathered."""
    return tuple(axes.fan_out(each, "vocab") for each in rows)


def logits_of(rows: jax.Array, head: jax.Array) -> jax.Array:
    """MD and DV -> MV float32."""
    return exact_einsum("MD,DV->MV", rows, head)


def entropy_of(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(cross entropy M, log of the normaliser M, column of the target M: outside if elsewhere)."""
    over, width = axes.names("vocab"), logits.shape[-1]
    here = targets - width * axes.index("vocab")
    top = logits.max(-1)
    top = lax.pmax(top, over) if over else top
    normaliser = jnp.exp(logits - top[:, None]).sum(-1)
    column = jnp.clip(here, 0, width - 1)[:, None]
    target = jnp.take_along_axis(logits, column, axis=1, mode="promise_in_bounds")[:, 0]
    if over:
        target = jnp.where((here >= 0) & (here < width), target, 0.0)
        normaliser, target = lax.psum((normaliser, target), over)
    log_normaliser = jnp.log(normaliser) + top
    return log_normaliser - target, log_normaliser, here


def gradients_of(
    rows: jax.Array,
    head: jax.Array,
    logits: jax.Array,
    scored: tuple[jax.Array, jax.Array, jax.Array],
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Of the weighted sum of entropies: MD, to be summed over the vocabulary's parts, and DV.

    Args:
      scored: what `entropy_of` made of the logits.
    """
    _, log_normaliser, column = scored
    hit = column[:, None] == jnp.arange(logits.shape[-1])[None]
    d_logits = (jnp.exp(logits - log_normaliser[:, None]) - hit) * weights[:, None]
    d_logits = d_logits.astype(head.dtype)
    d_rows = exact_einsum("MV,DV->MD", d_logits, head)
    return d_rows, row_product("MD,MV->DV", rows, d_logits)


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(array.reshape(-1, chunk, *array.shape[1:]) for array in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _head_loss(hidden, head, targets, weights, chunk):
    def one(_, part):
        rows, target = everywhere(*part)
        return None, axes.own(entropy_of(logits_of(rows, head), target)[0], "vocab")

    _, entropies = lax.scan(one, None, _chunks(chunk, hidden, targets))
    entropies = entropies.reshape(-1)
    return jnp.sum(entropies * weights), entropies


def _forward(hidden, head, targets, weights, chunk):
    def one(d_head, part):
        rows, target, weight = everywhere(*part)
        logits = logits_of(rows, head)
        scored = entropy_of(logits, target)
        d_rows, more = gradients_of(rows, head, logits, scored, weight)
        d_rows = axes.fan_in(d_rows, "vocab").astype(hidden.dtype)
        return d_head + more, (axes.own(scored[0], "vocab"), d_rows)

    start = jnp.zeros(head.shape, jnp.float32)
    parts = _chunks(chunk, hidden, targets, weights)
    d_head, (entropies, d_hidden) = lax.scan(one, start, parts)
    entropies = entropies.reshape(-1)
    saved = d_hidden.reshape(hidden.shape), d_head.astype(head.dtype)
    return (jnp.sum(entropies * weights), entropies), saved


def _backward(chunk, saved, cotangents):
    d_hidden, d_head = saved
    scale = cotangents[0]
    return (
        (d_hidden * scale).astype(d_hidden.dtype),
        (d_head * scale).astype(d_head.dtype),
        None,
        None,
    )


_head_loss.defvjp(_forward, _backward)
