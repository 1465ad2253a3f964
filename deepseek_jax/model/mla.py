"""Multi-head latent attention (MLA): section 2.1.1 of the report, equations 1 to 11.

Two forms of the same function. Training and prefill expand the latents to keys and values of every
head. Absorbed decoding attends to the latents themselves.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.kernels import attention_cudnn
from deepseek_jax.model import params, rotary
from deepseek_jax.model.absorbed_attention import gathered_attention, latent_attention
from deepseek_jax.model.causal_attention import FusedAttention, causal_attention
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.indexer import (
    Index,
    LightningIndexer,
    Rotation,
    chosen_positions,
    index_scores,
)
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.selected_attention import Selection, selected_attention
from deepseek_jax.parallel import axes
from deepseek_jax.precision.einsum import broadcast
from deepseek_jax.precision.saved import Saved, save

LATENT_NORM_EPS = 1e-6  # epsilon of the two latent norms, independent of the model's norm_eps


# Cached for each token: normalised latent C, rotated key R, and with an indexer its key I.
Kept = tuple[jax.Array, ...]


class Past(Protocol):
    """Latent cache of several requests, for a stack of layers."""

    @property
    def length(self) -> int:
        """Positions T of a request."""
        ...

    def write(self, layer: Any, positions: jax.Array, kept: Kept) -> "Past":
        """The cache with tokens BSC, BSR of a layer at positions BS; those without room dropped."""
        ...

    def read(self, layer: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Latents BTC and rotary keys BTR of one layer, at all positions."""
        ...

    def read_index(self, layer: Any, dtype: Any) -> jax.Array:
        """Index keys BTI of one layer, at all positions."""
        ...

    def gather(self, layer: Any, chosen: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Latents BSKC and rotary keys BSKR of one layer, at positions BSK."""
        ...


class LatentAttention(nnx.Module):
    """Attention that caches one latent and one rotary key per token, shared by all heads."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        model, heads = ("model", config.d_model), ("heads", config.heads)
        query = ("head_width", config.d_nope + config.d_rope)
        key_value = ("head_width", config.d_nope + config.d_value)
        q_latent, kv_latent = ("q_latent", config.q_latent), ("kv_latent", config.kv_latent)
        std = config.init_std
        if config.q_latent:
            self.query_down = params.weight(rngs, model, q_latent, std=std, roles="io")  # DQ, W^DQ
            self.query_norm = RMSNorm(config.q_latent, eps=LATENT_NORM_EPS, axis="q_latent")
            self.query_up = params.weight(
                rngs, q_latent, heads, query, std=std, roles="ioo"
            )  # QH(N+R), W^UQ, W^QR
        else:
            self.query = params.weight(rngs, model, heads, query, std=std, roles="ioo")  # DH(N+R)
        latent_and_rope = (None, config.kv_latent + config.d_rope)
        self.kv_down = params.weight(
            rngs, model, latent_and_rope, std=std, roles="io"
        )  # D(C+R), W^DKV, W^KR
        self.kv_norm = RMSNorm(config.kv_latent, eps=LATENT_NORM_EPS, axis="kv_latent")
        self.kv_up = params.weight(
            rngs, kv_latent, heads, key_value, std=std, roles="ioo"
        )  # CH(N+W), W^UK, W^UV
        value = ("head_width", config.d_value)
        self.out = params.weight(rngs, heads, value, model, std=std, roles="iio")  # HWD, W^O
        self.split_kv_up: Any = None  # kv_up split into halves, see model/packed_weights.py
        self.indexer: Any = LightningIndexer(config, rngs=rngs) if config.index_heads else None
        self.config = config

    def __call__(self, x: jax.Array, how: Execution) -> jax.Array:
        """x BSD, already normalised -> BSD, before the residual addition."""
        return self.prefill(x, how)[0]

    def prefill(self, x: jax.Array, how: Execution) -> tuple[jax.Array, Kept]:
        """Output as of `__call__`, and the cache entries of these tokens: BSC, BSR and BSI."""
        out, kept, _ = self.trained(x, how)
        return out, kept

    @jax.named_scope("attention")
    def trained(self, x: jax.Array, how: Execution) -> tuple[jax.Array, Kept, jax.Array | None]:
        """Output and cache entries as of `prefill`, and the indexer's loss, () or None."""
        self._check(x)
        config, einsum = self.config, how.recipe.einsum
        positions = jnp.arange(x.shape[1])

        # The non-rotary part comes first and is rotated by angle zero: no head is split.
        # The barrier makes one table of it: without it, each element computes its own cosine.
        rotation = jax.lax.optimization_barrier(
            rotary.cos_sin(config, positions, still=config.d_nope)
        )
        query_latent = self._query_latent(x, how)
        query = self._query(x, query_latent, how)
        query = rotary.rotate(query, *(part[None, :, None] for part in rotation))

        latent, key_rope = self.latent(x, how)  # BSC, BSR
        latent = axes.fan_out(self.kv_norm(latent), "heads")
        key_rope = axes.fan_out(key_rope, "heads")
        key_value = einsum("BSC,CHX->BSHX", latent, self.kv_up[...])
        key_nope, value = jnp.split(key_value, [config.d_nope], axis=-1)
        angles = tuple(part[None, :, config.d_nope :] for part in rotation)
        key_rope = rotary.rotate(key_rope, *angles)
        kept: Kept = latent, key_rope
        index = selection = None
        if self.indexer is not None:
            index, selection = self._index(x, query_latent, how, angles)
            kept = *kept, index[2]
        key_rope = broadcast(key_rope[:, :, None], (*key_nope.shape[:-1], config.d_rope))
        key = jnp.concatenate([key_nope, key_rope], axis=-1)

        project = functools.partial(einsum, "BSHW,HWD->BSD")
        scale = rotary.softmax_scale(config)
        if index is not None and selection is not None:
            mixed, loss = selected_attention(
                query, key, value, index, selection, scale=scale, block=how.attention_block,
                keep_scores=how.remat.keep_scores,
            )  # fmt: skip
            out = how.recipe.from_kept(Saved.ATTENTION, project, mixed, self.out[...])
            return axes.fan_in(out, "heads"), kept, loss if selection.loss else None
        out = attend_and_project(query, key, value, project, self.out[...], how, scale)
        return axes.fan_in(out, "heads"), kept, None

    @jax.named_scope("attention")
    def decode(
        self, x: jax.Array, how: Execution, past: Past, layer: Any, positions: jax.Array
    ) -> tuple[jax.Array, Past]:
        """Absorbed decoding: attention of new tokens to the cached latents of their requests.

        q^C . (W^UK c) = (W^UK^T q^C) . c and sum_j a_j W^UV c_j = W^UV sum_j a_j c_j: so all heads
        share one key of width C + R and one value of width C; keys and values of heads never exist.

        Args:
          x: BSD, already normalised.
          past: cache of earlier positions; `layer` is this layer's index in it.
          positions: BS int32, position of each token in its request.

        Returns:
          BSD before the residual addition, and `past` with these tokens.
        """
        self._check(x)
        chex.assert_shape(positions, x.shape[:2], custom_message="positions: BS int32")
        chex.assert_type(positions, int)
        config, einsum = self.config, how.recipe.einsum
        cos, sin = rotary.cos_sin(config, positions)  # BSR
        query_latent = self._query_latent(x, how)
        query = self._query(x, query_latent, how)
        query_nope, query_rope = jnp.split(query, [config.d_nope], axis=-1)
        query_rope = rotary.rotate(query_rope, cos[:, :, None], sin[:, :, None])
        latent, key_rope = self.latent(x, how)
        kept: Kept = self.kv_norm(latent), rotary.rotate(key_rope, cos, sin)
        if self.indexer is not None:
            kept = *kept, self.indexer.key(x, how, (cos, sin))
        past = past.write(layer, positions, kept)

        up_key, up_value = self._halves()
        absorbed = einsum("BSHN,HCN->BSHC", query_nope, up_key)
        scale = rotary.softmax_scale(config)
        if self.indexer is None or past.length <= config.index_top_k:
            latent, key_rope = past.read(layer, x.dtype)
            given = absorbed, query_rope, latent, key_rope, positions
            mean = latent_attention(*given, scale, how.recipe.kernels)
        else:
            index_query, weights = self.indexer.query(x, query_latent, how, (cos, sin))
            scores = index_scores(index_query, weights, past.read_index(layer, x.dtype))
            chosen = chosen_positions(scores, positions, config.index_top_k)
            latent, key_rope = past.gather(layer, chosen, x.dtype)
            past_of_query = chosen <= positions[..., None]
            mean = gathered_attention(
                absorbed, query_rope, latent, key_rope, past_of_query, scale=scale
            )
        mixed = einsum("BSHC,HCW->HBSW", mean, up_value)
        return axes.fan_in(einsum("HBSW,HWD->BSD", mixed, self.out[...]), "heads"), past

    def selected(self, x: jax.Array, how: Execution) -> jax.Array:
        """Positions BSK int32 that each token of x BSD attends to, -1 where there are fewer."""
        positions = jnp.arange(x.shape[1])
        cos, sin = rotary.cos_sin(self.config, positions)
        latent = self._query_latent(x, how)
        (query, weights, key), _ = self._index(x, latent, how, (cos[None], sin[None]))
        count = min(self.config.index_top_k, x.shape[1])
        chosen = chosen_positions(index_scores(query, weights, key), positions[None], count)
        return jnp.where(chosen <= positions[None, :, None], chosen, -1)

    def _check(self, x: jax.Array) -> None:
        chex.assert_shape(x, (None, None, self.config.d_model), custom_message="x: BSD")
        chex.assert_type(x, float)

    def _halves(self) -> tuple[jax.Array, jax.Array]:
        """W^UK as HCN and W^UV as HCW."""
        if self.split_kv_up is not None:
            return self.split_kv_up.key[...], self.split_kv_up.value[...]
        key, value = jnp.split(self.kv_up[...].swapaxes(0, 1), [self.config.d_nope], axis=-1)
        return key, value

    def latent(self, x: jax.Array, how: Execution) -> tuple[jax.Array, jax.Array]:
        """Latents c^KV BSC before the norm and keys k^R BSR before rotation, equations 1 and 3."""
        down = how.recipe.einsum("BSD,DX->BSX", x, self.kv_down[...])
        latent, key_rope = jnp.split(down, [self.config.kv_latent], axis=-1)
        return save(Saved.KV_LATENT, latent), save(Saved.KEY_ROPE, key_rope)

    def _query_latent(self, x: jax.Array, how: Execution) -> jax.Array | None:
        """Normalised query latent c^Q BSQ, equation 6; None where queries have no latent."""
        if not self.config.q_latent:
            return None
        down = how.recipe.einsum("BSD,DQ->BSQ", x, self.query_down[...])
        return self.query_norm(save(Saved.QUERY_LATENT, down))

    def _query(self, x: jax.Array, latent: jax.Array | None, how: Execution) -> jax.Array:
        """Queries BSH(N+R), equations 7 and 8 before rotation; the rotary part is last."""
        einsum = how.recipe.einsum
        if latent is None:
            return einsum("BSD,DHX->BSHX", axes.fan_out(x, "heads"), self.query[...])
        return einsum("BSQ,QHX->BSHX", axes.fan_out(latent, "heads"), self.query_up[...])

    def _index(
        self, x: jax.Array, query_latent: jax.Array | None, how: Execution, rotation: Rotation
    ) -> tuple[Index, Selection | None]:
        """Operands of the index scores, whose inputs are detached, and their use.

        The use is None where every position is selected and no loss is computed: plain attention.
        """
        assert query_latent is not None, "by the rules of `config`"
        x, query_latent = jax.lax.stop_gradient((x, query_latent))
        index = (
            *self.indexer.query(x, query_latent, how, rotation),
            self.indexer.key(x, how, rotation),
        )
        warm_up, top_k = how.index_loss == "warm_up", self.config.index_top_k
        selection = Selection(None if warm_up else top_k, how.index_loss != "none")
        whole = warm_up or x.shape[1] <= top_k
        return index, None if whole and not selection.loss else selection


def attend(
    norm: RMSNorm, attention: LatentAttention, x: jax.Array, how: Execution
) -> tuple[jax.Array, jax.Array | None]:
    """Residual attention sublayer: x + MLA(norm x), BSD; and the indexer's loss, () or None."""
    out, _, loss = attention.trained(norm(x), how)
    return save(Saved.ATTENDED, x + out), loss


def attend_and_project(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    project: Callable[[jax.Array, Any], jax.Array],
    weight: Any,
    how: Execution,
    scale: float,
) -> jax.Array:
    """Causal attention and the linear layer behind it.

    Args:
      query, key, value: BSHX, BSHX and BSHW.
      project: (heads' outputs BSHW, weight) -> BSD; closes over no array.
      weight: W^O, prepared by the recipe.
      scale: of the scores.
    """
    block = how.attention_block
    kernel = attention_cudnn.chosen(how.recipe.kernels)
    if kernel and attention_cudnn.takes(query, value):
        core = FusedAttention(kernel, scale, block)
        return how.recipe.from_kept_output(core, project, (query, key, value), weight)
    keep = how.remat.keep_scores
    mixed = causal_attention(query, key, value, scale=scale, block=block, keep_scores=keep)
    return how.recipe.from_kept(Saved.ATTENTION, project, mixed, weight)
