"""Causal attention over the keys and values of every head: equation 10 of the report.

In blocks of queries, whose scores are arrays in memory; or, on a GPU, by a kernel that keeps none.
The recipe says which.

B batch, S and T positions of queries and keys, H heads, X width of queries and keys, W of values.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp

from deepseek_jax.kernels.attention_cudnn import AttentionKernel
from deepseek_jax.precision.einsum import exact_einsum
from deepseek_jax.precision.grouped import by_platform


@dataclasses.dataclass(frozen=True)
class FusedAttention:
    """Causal attention by a kernel on a GPU, in blocks elsewhere: a `kept_output.Core`.

    Both forms have the same results and residuals: the output, and logarithms of the softmaxes'
    sums. Inside `shard_map` only, for XLA cannot split a kernel.

    Attributes:
      kernel: for a GPU.
      scale: of the scores.
      block: query rows whose scores are computed at once, elsewhere.
    """

    kernel: AttentionKernel
    scale: float
    block: int

    def forward(self, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Output BSHW of queries and keys BSHX and values BSHW; logarithms of sums, BHS float32."""
        return self._by_platform(lambda kernel: kernel.forward, *inputs)

    def backward(
        self, inputs: tuple[jax.Array, ...], out: jax.Array, rest: jax.Array, d_out: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Gradients of queries, keys and values."""
        return self._by_platform(lambda kernel: kernel.backward, *inputs, out, rest, d_out)

    def in_blocks(self) -> AttentionKernel:
        """The portable form, which computes each block's softmax again in backward."""

        def forward(*inputs: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
            query, key, value = (part.swapaxes(1, 2) for part in inputs)
            out, _, log_sums = _forward(query, key, value, scale, self.block, False)
            return out.swapaxes(1, 2), log_sums

        def backward(*given: jax.Array, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
            query, key, value, _, _, d_out = given
            query, key, value, d_out = (x.swapaxes(1, 2) for x in (query, key, value, d_out))
            saved = query, key, value, None
            found = _in_blocks_backward(scale, self.block, False, saved, d_out)
            d_query, d_key, d_value = (part.swapaxes(1, 2) for part in found)
            return d_query, d_key, d_value

        return AttentionKernel(forward, backward)

    def _by_platform(self, method: Callable[[AttentionKernel], Any], *given: jax.Array) -> Any:
        forms = self.kernel, self.in_blocks()
        cuda, default = (functools.partial(method(form), scale=self.scale) for form in forms)
        return by_platform(default, cuda)(*given)


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
) -> tuple[jax.Array, list[_Softmax], jax.Array]:
    """Output BHSW, the softmax of each block, and logarithms of the sums of exp s, BHS float32."""
    rows: list[jax.Array] = []
    softmaxes: list[_Softmax] = []
    log_sums: list[jax.Array] = []
    for start, end in _blocks(query.shape[2], block):
        own = query[:, :, start:end]
        if rows and not keep_scores:  # one after the other, or XLA holds the scores of several
            own, rows[-1] = jax.lax.optimization_barrier((own, rows[-1]))
        softmax, largest = _softmax(own, key[:, :, :end], scale, start)
        mean = exact_einsum("BHST,BHTW->BHSW", softmax[0], value[:, :, :end]) / softmax[1]
        rows.append(mean.astype(query.dtype))
        softmaxes.append(softmax)
        log_sums.append((largest + jnp.log(softmax[1]))[..., 0])
    return jnp.concatenate(rows, axis=2), softmaxes, jnp.concatenate(log_sums, axis=2)


def _in_blocks_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float, block: int, keep_scores: bool
) -> tuple[jax.Array, Any]:
    """Output, and for backward the queries, keys and values, with the softmaxes if kept."""
    out, softmaxes, _ = _forward(query, key, value, scale, block, keep_scores)
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
        softmax = softmaxes[i] if keep_scores else _softmax(rows, keys, scale, start)[0]
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


def _softmax(
    query: jax.Array, key: jax.Array, scale: float, start: int
) -> tuple[_Softmax, jax.Array]:
    """Weights e = exp(s - max s) of the scores s = scale q . k, in the dtype of keys; their sums.

    And max s, BHS1. The first query is at position `start`, and sees the keys up to itself.
    """
    scores = exact_einsum("BHSX,BHTX->BHST", query, key)
    past = start + jnp.arange(query.shape[2])[:, None] >= jnp.arange(key.shape[2])[None]  # ST
    scores = jnp.where(past[None, None], scores * scale, -jnp.inf)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    return (weights.astype(key.dtype), weights.sum(-1, keepdims=True)), largest


def _pull_back(
    softmax: _Softmax, value: jax.Array, d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the scores of a block, BHST, and of its values, BHWT float32.

    With sums l, the softmax is P = e / l, and dS = P (dP - sum_T P dP). Here g = dO / l makes e the
    only factor of BHST: dV = e^T g, dE = g V^T, dS = e (dE - sum_T(e dE) / l).
    """
    weights, total = softmax
    d_mean = (d_out.astype(jnp.float32) / total).astype(d_out.dtype)
    d_value = exact_einsum("BHSW,BHST->BHWT", d_mean, weights)
    d_weights = exact_einsum("BHSW,BHTW->BHST", d_mean, value)
    wide = weights.astype(jnp.float32)
    common = jnp.sum(wide * d_weights, axis=-1, keepdims=True) / total
    return (wide * (d_weights - common)).astype(value.dtype), d_value
