"""Multi-head latent attention: section 2.1.1 of the report, equations 1 to 11.

Two forms of the same: one that is trained and reads prompts, with keys and values for every head,
and the absorbed one that decodes, which stays with the latents.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params, rotary
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.parallel import axes
from deepseek_jax.precision.einsum import broadcast, exact_einsum
from deepseek_jax.precision.saved import Saved, save

LATENT_NORM_EPS = 1e-6  # of the two latent norms, whatever the model's own norm_eps is


Kept = tuple[jax.Array, jax.Array]  # of each token: normalised latent C, rotated key R


class Past(Protocol):
    """What decoding keeps of the tokens of several requests, in a stack of layers."""

    def write(self, layer: Any, positions: jax.Array, kept: Kept) -> "Past":
        """With tokens BSC and BSR of one layer at positions BS; where there is no room, without."""
        ...

    def read(self, layer: Any, dtype: Any) -> Kept:
        """All positions of one layer, BTC and BTR."""
        ...


class LatentAttention(nnx.Module):
    """Attention whose past is one latent and one rotary key per token, shared by all heads."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        model, heads = ("model", config.d_model), ("heads", config.heads)
        query = ("head_width", config.d_nope + config.d_rope)
        key_value = ("head_width", config.d_nope + config.d_value)
        q_latent, kv_latent = ("q_latent", config.q_latent), ("kv_latent", config.kv_latent)
        std = config.init_std
        if config.q_latent:
            self.query_down = params.weight(rngs, model, q_latent, std=std)  # DQ, W^DQ
            self.query_norm = RMSNorm(config.q_latent, eps=LATENT_NORM_EPS, axis="q_latent")
            self.query_up = params.weight(
                rngs, q_latent, heads, query, std=std
            )  # QH(N+R), W^UQ, W^QR
        else:
            self.query = params.weight(rngs, model, heads, query, std=std)  # DH(N+R)
        latent_and_rope = (None, config.kv_latent + config.d_rope)
        self.kv_down = params.weight(rngs, model, latent_and_rope, std=std)  # D(C+R), W^DKV, W^KR
        self.kv_norm = RMSNorm(config.kv_latent, eps=LATENT_NORM_EPS, axis="kv_latent")
        self.kv_up = params.weight(
            rngs, kv_latent, heads, key_value, std=std
        )  # CH(N+W), W^UK, W^UV
        value = ("head_width", config.d_value)
        self.out = params.weight(rngs, heads, value, model, std=std)  # HWD, W^O
        self.split_kv_up: Any = None  # of kv_up, model/packed_weights.py
        self.config = config

    def __call__(self, x: jax.Array, how: Execution) -> jax.Array:
        """x BSD, already normalised -> BSD, before the residual is added."""
        return self.prefill(x, how)[0]

    @jax.named_scope("attention")
    def prefill(self, x: jax.Array, how: Execution) -> tuple[jax.Array, Kept]:
        """The same, and what decoding keeps of these tokens: BSC and BSR."""
        config, einsum = self.config, how.recipe.einsum
        positions = jnp.arange(x.shape[1])

        # The non-rotary part leads and turns by angle zero: no head is taken apart.
        turn = rotary.cos_sin(config, positions, still=config.d_nope)
        query = rotary.rotate(self._query(x, how), *(part[None, :, None] for part in turn))

        latent, key_rope = self.latent(x, how)  # BSC, BSR
        latent = axes.fan_out(self.kv_norm(latent), "heads")
        key_rope = axes.fan_out(key_rope, "heads")
        key_value = einsum("BSC,CHX->BSHX", latent, self.kv_up[...])
        key_nope, value = jnp.split(key_value, [config.d_nope], axis=-1)
        turn = rotary.cos_sin(config, positions)
        key_rope = rotary.rotate(key_rope, *(part[None] for part in turn))
        kept = latent, key_rope
        key_rope = broadcast(key_rope[:, :, None], (*key_nope.shape[:-1], config.d_rope))
        key = jnp.concatenate([key_nope, key_rope], axis=-1)

        scale = rotary.softmax_scale(config)
        block, keep = how.attention_block, how.remat.keep_scores
        mixed = causal_attention(query, key, value, scale=scale, block=block, keep_scores=keep)
        mixed = save(Saved.ATTENTION, mixed)
        return axes.fan_in(einsum("BSHW,HWD->BSD", mixed, self.out[...]), "heads"), kept

    @jax.named_scope("attention")
    def decode(
        self, x: jax.Array, how: Execution, past: Past, layer: Any, positions: jax.Array
    ) -> tuple[jax.Array, Past]:
        """The absorbed form, for tokens that follow on what is kept of their requests.

        q^C . (W^UK c) = (W^UK^T q^C) . c and sum_j a_j W^UV c_j = W^UV sum_j a_j c_j: so all heads
        share one key of C + R and one value of C, and neither is ever made for a head.

        Args:
          x: BSD, already normalised.
          past: what is kept of earlier positions; this layer's is number `layer`.
          positions: BS int32, of each token in its request.

        Returns:
          BSD before the residual is added, and `past` with these tokens.
        """
        config, einsum = self.config, how.recipe.einsum
        cos, sin = rotary.cos_sin(config, positions)  # BSR
        query_nope, query_rope = jnp.split(self._query(x, how), [config.d_nope], axis=-1)
        query_rope = rotary.rotate(query_rope, cos[:, :, None], sin[:, :, None])
        latent, key_rope = self.latent(x, how)
        kept = self.kv_norm(latent), rotary.rotate(key_rope, cos, sin)
        past = past.write(layer, positions, kept)

        up_key, up_value = self._halves()
        query_latent = einsum("BSHN,HCN->BSHC", query_nope, up_key)
        latent, key_rope = past.read(layer, x.dtype)
        scale = rotary.softmax_scale(config)
        mean = latent_attention(query_latent, query_rope, latent, key_rope, positions, scale)
        mixed = einsum("BSHC,HCW->HBSW", mean, up_value)
        return axes.fan_in(einsum("HBSW,HWD->BSD", mixed, self.out[...]), "heads"), past

    def _halves(self) -> tuple[jax.Array, jax.Array]:
        """W^UK as HCN and W^UV as HCW."""
        if self.split_kv_up is not None:
            return self.split_kv_up.key[...], self.split_kv_up.value[...]
        key, value = jnp.split(self.kv_up[...].swapaxes(0, 1), [self.config.d_nope], axis=-1)
        return key, value

    def latent(self, x: jax.Array, how: Execution) -> tuple[jax.Array, jax.Array]:
        """What decoding keeps, before norm and rotation (equations 1 and 3): BSC and BSR."""
        down = how.recipe.einsum("BSD,DX->BSX", x, self.kv_down[...])
        latent, key_rope = jnp.split(down, [self.config.kv_latent], axis=-1)
        return save(Saved.KV_LATENT, latent), save(Saved.KEY_ROPE, key_rope)

    def _query(self, x: jax.Array, how: Execution) -> jax.Array:
        """Equations 6 to 8, before rotation: BSH(N+R), the rotary part last."""
        einsum = how.recipe.einsum
        if not self.config.q_latent:
            return einsum("BSD,DHX->BSHX", axes.fan_out(x, "heads"), self.query[...])
        down = save(Saved.QUERY_LATENT, einsum("BSD,DQ->BSQ", x, self.query_down[...]))
        latent = axes.fan_out(self.query_norm(down), "heads")
        return einsum("BSQ,QHX->BSHX", latent, self.query_up[...])


def attend(norm: RMSNorm, attention: LatentAttention, x: jax.Array, how: Execution) -> jax.Array:
    """x + MLA(norm x), BSD."""
    return save(Saved.ATTENDED, x + attention(norm(x), how))


def latent_attention(
    query_latent: jax.Array,
    query_rope: jax.Array,
    latent: jax.Array,
    key_rope: jax.Array,
    positions: jax.Array,
    scale: float,
) -> jax.Array:
    """The mean of the latents that each head of each query attends to; softmax in float32.

    Args:
      query_latent, query_rope: BSHC and BSHR.
      latent, key_rope: BTC and BTR, where token j stands at position j; later ones are not seen.
      positions: BS, of the queries.

    Returns:
      BSHC in the dtype of the queries.
    """
    scores = exact_einsum("BSHC,BTC->BHST", query_latent, latent)
    scores = scores + exact_einsum("BSHR,BTR->BHST", query_rope, key_rope)
    past = positions[:, :, None] >= jnp.arange(latent.shape[1])[None, None]  # BST
    scores = jnp.where(past[:, None], scores * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(latent.dtype)
    mean = exact_einsum("BHST,BTC->BHSC", weights, latent).astype(query_latent.dtype)
    return mean.swapaxes(1, 2)  # as BSHC at once, the sum over T is five times slower on a CPU


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    block: int,
    keep_scores: bool = False,
) -> jax.Array:
    """softmax(scale * query . key) value over the past, equations 10 and 11; softmax in float32.

    Queries go `block` rows at a time and meet only the keys up to their own end, so that most of
    the half that the mask would remove is never computed.

    Args:
      query, key: BSHX, any common width X.
      value: BSHW.
      keep_scores: keep the softmax of all blocks for backward instead of making each again.

    Returns:
      BSHW in the dtype of `query`.
    """
    return _in_blocks(query, key, value, scale, block, keep_scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _in_blocks(query, key, value, scale, block, keep_scores):
    blocks = _blocks(query, key, value, scale, block)
    return jnp.concatenate([attend(*parts) for attend, parts in blocks], axis=1)


def _in_blocks_forward(query, key, value, scale, block, keep_scores):
    if not keep_scores:
        return _in_blocks(query, key, value, scale, block, keep_scores), (query, key, value)
    blocks = _blocks(query, key, value, scale, block)
    outs, pulls = zip(*(jax.vjp(attend, *parts) for attend, parts in blocks), strict=True)
    return jnp.concatenate(outs, axis=1), list(pulls)


def _in_blocks_backward(scale, block, keep_scores, saved, d_out):
    """Every block of queries adds to the gradients of the keys that it met: in float32."""
    dtype, length = d_out.dtype, d_out.shape[1]
    starts = range(0, length, block)
    if keep_scores:
        pulls = saved
    else:  # the barrier keeps XLA from sharing, and so keeping, forward's scores
        saved, d_out = jax.lax.optimization_barrier((saved, d_out))
        query, key, value = saved
        blocks = _blocks(query, key, value, scale, block)
        pulls = [
            lambda d, attend=attend, parts=parts: jax.vjp(attend, *parts)[1](d)
            for attend, parts in blocks
        ]
    d_query: list[jax.Array] = []
    totals: list[jax.Array] = []
    for start, pull in reversed(list(zip(starts, pulls, strict=True))):  # the last met all keys
        end = min(start + block, length)
        d_rows, *d_met = pull(d_out[:, start:end])
        d_query.append(d_rows)
        wide = [part.astype(jnp.float32) for part in d_met]
        both = zip(totals, wide, strict=True)
        totals = [total.at[:, :end].add(part) for total, part in both] if totals else wide
    d_key, d_value = (total.astype(dtype) for total in totals)
    return jnp.concatenate(d_query[::-1], axis=1), d_key, d_value


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _blocks(query: jax.Array, key: jax.Array, value: jax.Array, scale: float, block: int) -> Any:
    """Of each block of queries: what attends, and the queries, keys and values that it takes."""
    length = query.shape[1]
    for start in range(0, length, block):
        end = min(start + block, length)
        attend = functools.partial(_attend, scale=scale, start=start)
        yield attend, (query[:, start:end], key[:, :end], value[:, :end])


def _attend(query, key, value, scale, start):
    scores = exact_einsum("BSHX,BTHX->BHST", query, key)
    past = start + jnp.arange(query.shape[1])[:, None] >= jnp.arange(key.shape[1])[None]  # ST
    scores = jnp.where(past[None, None], scores * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return exact_einsum("BHST,BTHW->BSHW", weights, value).astype(query.dtype)
