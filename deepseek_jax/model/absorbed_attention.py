"""Absorbed attention: new tokens attend to cached latents, of which keys and values are made.

B requests, S new tokens, T positions of the cache, H heads, C width of latents, R of rotary keys,
K positions that the indexer of V3.2 chooses.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from deepseek_jax.kernels import kernel_names
from deepseek_jax.kernels import latent_attention as kernel
from deepseek_jax.precision.einsum import exact_einsum
from deepseek_jax.precision.grouped import by_platform


def latent_attention(
    query_latent: jax.Array,
    query_rope: jax.Array,
    latent: jax.Array,
    key_rope: jax.Array,
    positions: jax.Array,
    scale: float,
    kernels: frozenset[str] = frozenset(),
) -> jax.Array:
    """Attention-weighted mean of the latents for each head of each query; softmax in float32.

    Args:
      query_latent, query_rope: BSHC and BSHR.
      latent, key_rope: BTC and BTR; token j is at position j, and queries before j do not see it.
      positions: BS, positions of the queries.
      kernels: names of kernels that may compute on a GPU.

    Returns:
      BSHC in the dtype of the queries.
    """
    given = query_latent, query_rope, latent, key_rope, positions
    chex.assert_rank(given, [4, 4, 3, 3, 2])
    taken = kernel.takes(query_latent, latent, key_rope)
    if kernel_names.LATENT_ATTENTION not in kernels or not taken:
        return latent_attention_in_full(*given, scale=scale)
    portable, on_a_gpu = (
        functools.partial(form, scale=scale) for form in (latent_attention_in_full, kernel.attend)
    )
    return by_platform(portable, on_a_gpu)(*given)


def latent_attention_in_full(
    query_latent: jax.Array,
    query_rope: jax.Array,
    latent: jax.Array,
    key_rope: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """`latent_attention` in its portable form, with all scores in memory."""
    scores = exact_einsum("BSHC,BTC->BHST", query_latent, latent)
    scores = scores + exact_einsum("BSHR,BTR->BHST", query_rope, key_rope)
    past = positions[:, :, None] >= jnp.arange(latent.shape[1])[None, None]  # BST
    scores = jnp.where(past[:, None], scores * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(latent.dtype)
    mean = exact_einsum("BHST,BTC->BHSC", weights, latent).astype(query_latent.dtype)
    return mean.swapaxes(1, 2)  # an einsum to BSHC is five times slower on a CPU (measured)


def gathered_attention(
    query_latent: jax.Array,
    query_rope: jax.Array,
    latent: jax.Array,
    key_rope: jax.Array,
    seen: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Attention-weighted mean of the latents that each query has chosen; softmax in float32.

    Args:
      query_latent, query_rope: BSHC and BSHR.
      latent, key_rope: BSKC and BSKR, of the K positions of each query.
      seen: BSK, whether a position is one that the query may see.

    Returns:
      BSHC in the dtype of the queries.
    """
    scores = exact_einsum("BSHC,BSKC->BSHK", query_latent, latent)
    scores = scores + exact_einsum("BSHR,BSKR->BSHK", query_rope, key_rope)
    scores = jnp.where(seen[:, :, None], scores * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(latent.dtype)
    return exact_einsum("BSHK,BSKC->BSHC", weights, latent).astype(query_latent.dtype)
