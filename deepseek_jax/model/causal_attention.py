"""Causal attention over the keys and values of every head: equation 10 of the report.

B batch, S and T positions of queries and keys, H heads, X width of queries and keys, W of values.
"""

import functools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp

from deepseek_jax.precision.einsum import exact_einsum


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    block: int,
    keep_scores: bool = False,
) -> jax.Array:
    """Causal softmax(scale * query . key) value, equation 10; softmax in float32.

    Queries are taken in blocks of `block` rows, each with only the keys up to the block's end, so
    that most of the half that the mask removes is never computed.

    Args:
      query, key: BSHX, any common width X.
      value: BSHW.
      keep_scores: save the softmax of all blocks for backward instead of recomputing them.

    Returns:
      BSHW in the dtype of `query`.
    """
    chex.assert_equal_shape([query, key], custom_message="query and key: BSHX")
    chex.assert_shape(value, (*key.shape[:3], None), custom_message="value: BSHW")
    chex.assert_type([query, key, value], float)
    heads_first = (part.swapaxes(1, 2) for part in (query, key, value))
    return _in_blocks(*heads_first, scale, block, keep_scores).swapaxes(1, 2)


# Below, the heads precede the positions (BHSX, BHTX, BHTW): a CPU multiplies matrices that lie
# whole in memory up to twice as fast (measured), and a GPU's matmul library asks for them too.
_Softmax = tuple[jax.Array, jax.Array]  # weights e BHST and their sums BHS1, float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _in_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float, block: int, keep_scores: bool
) -> jax.Array:
    return _forward(query, key, value, scale, block, keep_scores)[0]


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float, block: int, keep_scores: bool
) -> tuple[jax.Array, list[_Softmax]]:
    """Output BHSW, and the softmax of each block."""
    rows: list[jax.Array] = []
    softmaxes: list[_Softmax] = []
    for start, end in _blocks(query.shape[2], block):
        own = query[:, :, start:end]
        if rows and not keep_scores:  # one after the other, or XLA holds the scores of several
            own, rows[-1] = jax.lax.optimization_barrier((own, rows[-1]))
        softmax = _softmax(own, key[:, :, :end], scale, start)
        mean = exact_einsum("BHST,BHTW->BHSW", softmax[0], value[:, :, :end]) / softmax[1]
        rows.append(mean.astype(query.dtype))
        softmaxes.append(softmax)
    return jnp.concatenate(rows, axis=2), softmaxes


def _in_blocks_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float, block: int, keep_scores: bool
) -> tuple[jax.Array, Any]:
    """Output, and for backward the queries, keys and values, with the softmaxes if kept."""
    out, softmaxes = _forward(query, key, value, scale, block, keep_scores)
    return out, (query, key, value, softmaxes if keep_scores else None)


def _in_blocks_backward(
    scale: float, block: int, keep_scores: bool, saved: Any, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values; those of keys and values add up in float32."""
    if not keep_scores:  # without the barrier XLA reuses, and so keeps in memory, forward's scores
        saved, d_out = jax.lax.optimization_barrier((saved, d_out))
    query, key, value, softmaxes = saved
    d_query: list[jax.Array] = []
    d_key = d_value = None
    bounds = list(enumerate(_blocks(query.shape[2], block)))
    for i, (start, end) in reversed(bounds):  # the last block has all keys
        rows, keys, values = query[:, :, start:end], key[:, :, :end], value[:, :, :end]
        if d_query and not keep_scores:  # one after the other, as in forward
            rows, d_query[-1], d_key, d_value = jax.lax.optimization_barrier(
                (rows, d_query[-1], d_key, d_value)
            )
        softmax = softmaxes[i] if keep_scores else _softmax(rows, keys, scale, start)
        d_scores, d_values = _pull_back(softmax, values, d_out[:, :, start:end])
        d_rows = scale * exact_einsum("BHST,BHTX->BHSX", d_scores, keys)
        d_query.append(d_rows.astype(query.dtype))
        d_keys = exact_einsum("BHSX,BHST->BHXT", rows, d_scores)
        d_key = d_keys if d_key is None else d_key.at[..., :end].add(d_keys)
        d_value = d_values if d_value is None else d_value.at[..., :end].add(d_values)
    assert d_key is not None and d_value is not None, "there is at least one position"
    d_key, d_value = (scale * d_key).astype(key.dtype), d_value.astype(value.dtype)
    return jnp.concatenate(d_query[::-1], axis=2), d_key.swapaxes(2, 3), d_value.swapaxes(2, 3)


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _blocks(length: int, block: int) -> Iterator[tuple[int, int]]:
    """First position and end of each block of queries."""
    return ((start, min(start + block, length)) for start in range(0, length, block))


def _softmax(query: jax.Array, key: jax.Array, scale: float, start: int) -> _Softmax:
    """Weights e = exp(s - max s) of the scores s = scale q . k, in the dtype of keys; their sums.

    The first query is at position `start`, and sees the keys up to itself.
    """
    scores = exact_einsum("BHSX,BHTX->BHST", query, key)
    past = start + jnp.arange(query.shape[2])[:, None] >= jnp.arange(key.shape[2])[None]  # ST
    scores = jnp.where(past[None, None], scores * scale, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights.astype(key.dtype), weights.sum(-1, keepdims=True)


def _pull_back(
    softmax: _Softmax, value: jax.Array, d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the scores of a block, BHST, and of its values, BHWT float32.

    With sums l, the softmax is P = e / l, and dS = P (dP - sum_T P dP). Here g = dO / l makes e the
    only factor of BHST: dV = e^T g, dE = g V^T, dS = e (dE - sum_T(e dE) / l).
    """
    weights, total = softmax
    d_mean = (d_out / total).astype(d_out.dtype)
    d_value = exact_einsum("BHSW,BHST->BHWT", d_mean, weights)
    d_weights = exact_einsum("BHSW,BHTW->BHST", d_mean, value)
    common = jnp.sum(weights * d_weights, axis=-1, keepdims=True) / total
    return (weights * (d_weights - common)).astype(value.dtype), d_value
