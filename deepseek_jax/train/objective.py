"""Objective of a step: next-token and MTP losses of its sequences, and their balance loss."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model import execution, params, router
from deepseek_jax.model.loss import head_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over the micro-batches of one step, and then over the ranks; all float32.

    Attributes:
      entropy: (1 + depth), cross entropy of each head over its valid targets, in nats.
      balance: () sequence-wise balance loss without alpha, over layers and sequences.
      load: LE, tokens received by each expert of each MoE layer, MTP blocks last.
      traffic: of the same layers; its rounds are summed over micro-batches and devices.
      index: () loss of the indexers, over layers and queries, MTP blocks too; None without.
    """

    entropy: jax.Array
    balance: jax.Array
    load: jax.Array
    traffic: router.Traffic
    index: jax.Array | None = None


def head_weights(depth: int, length: int, mtp_weight: jax.Array | float) -> jax.Array:
    """Weight of each position's cross entropy in the loss of one sequence: (1 + depth)S float32.

    The main loss is a mean over S positions. MTP depth k has targets at the first S - k positions;
    its loss is a mean over those, weighted by mtp_weight / depth (equation 25).
    """
    k = jnp.arange(depth + 1)[:, None]
    valid = jnp.arange(length)[None] < length - k
    scale = jnp.where(k == 0, 1.0, mtp_weight / max(depth, 1)) / (length - k)
    return jnp.where(valid, scale, 0.0).astype(jnp.float32)


def targets_of(
    tokens: jax.Array, depth: int, mtp_weight: jax.Array | float, sequences: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Targets of each head in tokens B(S+1), and their weights in the loss: (1 + depth)BS both."""
    length = tokens.shape[1] - 1
    padded = jnp.pad(tokens, ((0, 0), (0, depth)))
    targets = jnp.stack([padded[:, 1 + k : 1 + k + length] for k in range(depth + 1)])
    weights = head_weights(depth, length, mtp_weight)
    return targets, jnp.broadcast_to(weights[:, None] / sequences, targets.shape)


def objective(
    model: Any,
    tokens: jax.Array,
    *,
    how: execution.Execution,
    chunk: int,
    mtp_weight: jax.Array | float,
    alpha: float,
    sequences: jax.Array | float,
    index: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
    """Loss of one micro-batch on one device.

    Args:
      model: a `Transformer`.
      tokens: B(S+1) int32: inputs and, one to the right, targets.
      how: execution of the model.
      chunk: rows whose logits are held at once.
      mtp_weight: lambda of equation 25.
      alpha: weight of the sequence-wise balance loss (equation 17).
      sequences: in the whole step, over all devices and micro-batches.
      index: weight of the indexers' loss, which is a sum over queries; None without.

    Returns:
      () float32, which summed over devices and micro-batches is main loss + mtp_weight * mean of
      the MTP losses + alpha * balance loss + index * the indexers' loss; and the sums to record.
    """
    hidden = model.hidden(tokens, how, ahead=1)
    depth = model.config.mtp_depth
    targets, each = targets_of(tokens, depth, mtp_weight, sequences)
    head = params.whole(model.head).table[...]
    rows = hidden.heads.reshape(-1, hidden.heads.shape[-1])  # MBSD -> (MBS)D
    loss, entropies = head_loss(
        rows, head, targets.reshape(-1), each.reshape(-1), min(chunk, rows.shape[0])
    )
    entropy = counted(entropies.reshape(targets.shape), each)
    routings = [r for r in (hidden.routing, hidden.mtp_routing) if r is not None]
    balance = sum((r.balance.sum() for r in routings), jnp.zeros(()))
    layers = [(r.load, r.traffic) for r in routings] or [no_layers(model.config.experts)]
    load, traffic = jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers)
    sums = Sums(entropy, balance, load, traffic, hidden.index_loss)
    loss = loss + alpha * balance / sequences
    if index is not None:
        loss = loss + index * hidden.index_loss
    return loss, lax.stop_gradient(sums)


def counted(entropies: jax.Array, weights: jax.Array) -> jax.Array:
    """Cross entropy summed over each head's valid positions: (1 + depth)BS both -> (1 + depth)."""
    return jnp.where(weights > 0, entropies, 0.0).sum((1, 2))


def no_layers(experts: int) -> tuple[jax.Array, router.Traffic]:
    """Load and traffic of zero layers."""
    nothing = jnp.zeros((0, 1))
    return jnp.zeros((0, experts)), router.Traffic(nothing, nothing, jnp.zeros((0,)))
