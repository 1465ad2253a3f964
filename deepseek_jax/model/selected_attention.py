"""Causal attention to the positions that the indexer selects, and the indexer's loss.

Training and prefill compute the scores of all positions in blocks of queries, and mask those that
are not selected; decoding gathers the selected latents instead (`absorbed_attention.py`).

The indexer learns from the attention of all heads (section 2.1.1 of the DeepSeek-V3.2-Exp report):

    L = sum_t KL(p_{t,:} || softmax(I_{t,:}))                        (equation 3, "warm_up")
    L = sum_t KL(p_{t,S_t} || softmax(I_{t,S_t}))                    (equation 4, "sparse")

with p_t the attention weights of position t, summed over the heads and divided by their sum, and
S_t the positions selected for t. No gradient of L passes p, and none reaches the indexer's inputs.

B batch, S and T positions of queries and keys, H heads, X width of queries and keys, W of values.
"""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from deepseek_jax.model.indexer import Index, among_the_largest, index_scores
from deepseek_jax.parallel import axes
from deepseek_jax.precision.einsum import exact_einsum


@dataclasses.dataclass(frozen=True)
class Selection:
    """How the attention of a layer uses its indexer.

    Attributes:
      top_k: positions that a query attends to; None for all.
      loss: whether the indexer's loss is computed.
    """

    top_k: int | None
    loss: bool


def selected_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index: Index,
    selection: Selection,
    *,
    scale: float,
    block: int,
    keep_scores: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Causal softmax(scale * query . key) value over selected positions; softmax in float32.

    Args:
      query, key: BSHX.
      value: BSHW.
      index: of the indexer: queries, weights and keys.
      block: query rows whose scores are computed at once, each with the keys up to the block's end.
      keep_scores: save everything for backward instead of recomputing each block.

    Returns:
      BSHW in the dtype of `query`, and the loss summed over all queries, () float32; 0 without it.
    """
    chex.assert_equal_shape([query, key], custom_message="query and key: BSHX")
    length = query.shape[1]
    out: list[jax.Array] = []
    losses: list[jax.Array] = []
    for start in range(0, length, block):
        end = min(start + block, length)
        run: Any = functools.partial(_rows, selection=selection, scale=scale, start=start)
        rows = query[:, start:end], *(part[:, start:end] for part in index[:2])
        if not keep_scores:
            run = jax.checkpoint(run)
            if out:  # one after the other, or XLA holds the scores of several
                rows, out[-1] = jax.lax.optimization_barrier((rows, out[-1]))
        mixed, loss = run(*rows, key[:, :end], value[:, :end], index[2][:, :end])
        out.append(mixed)
        losses.append(loss)
    return jnp.concatenate(out, axis=1), sum(losses[1:], losses[0])


def _rows(
    query: jax.Array,
    index_query: jax.Array,
    weights: jax.Array,
    key: jax.Array,
    value: jax.Array,
    index_key: jax.Array,
    *,
    selection: Selection,
    scale: float,
    start: int,
) -> tuple[jax.Array, jax.Array]:
    """Output BSHW and loss of a block of queries, of which the first is at position `start`."""
    length = key.shape[1]
    seen = start + jnp.arange(query.shape[1])[:, None] >= jnp.arange(length)[None]  # ST, causal
    seen = seen[None]
    index = index_scores(index_query, weights, index_key)  # BST
    if selection.top_k is not None and selection.top_k < length:
        masked = jnp.where(seen, jax.lax.stop_gradient(index), -jnp.inf)
        seen = among_the_largest(masked, selection.top_k) & seen
    scores = jnp.where(seen[:, None], scale * exact_einsum("BSHX,BTHX->BHST", query, key), -jnp.inf)
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    softmax = jnp.exp(scores - largest)
    total = softmax.sum(-1, keepdims=True)
    mean = exact_einsum("BHST,BTHW->BHSW", softmax.astype(key.dtype), value) / total
    mixed = mean.astype(query.dtype).swapaxes(1, 2)
    if not selection.loss:
        return mixed, jnp.zeros(())
    return mixed, _divergence(jax.lax.stop_gradient(softmax / total), index, seen)


def _divergence(attention: jax.Array, index: jax.Array, seen: jax.Array) -> jax.Array:
    """Sum over queries of KL(p || softmax(I)), over the positions that are `seen`.

    Args:
      attention: BHST, weights of this device's heads.
      index: BST, index scores.
      seen: BST or 1ST bool.
    """
    summed = axes.fan_in(attention.sum(1), "heads")
    target = summed / summed.sum(-1, keepdims=True)  # p BST
    log_index = jax.nn.log_softmax(jnp.where(seen, index, -jnp.inf), axis=-1)
    log_index = jnp.where(seen, log_index, 0.0)
    return jnp.sum(jax.scipy.special.xlogy(target, target) - target * log_index)
