"""Packed weights, for decoding few tokens on one CPU.

The time of a decoding step of few tokens is that of reading all weights. The largest ones are
therefore packed once, when a model is opened (`precision/packed_product.py`); prefill keeps using
the unpacked ones. The two halves of kv_up are split, too, which each step would do otherwise.

E experts, M tokens, D model width, F hidden width, V vocabulary, H heads, C latent, N and W widths
of a head's key and value.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model import params
from deepseek_jax.model.moe import scaled
from deepseek_jax.precision import packed_product
from deepseek_jax.precision.swiglu import swiglu


class PackedExperts(nnx.Module):
    """Packed weights of E experts, each a SwiGLU network."""

    def __init__(self, gate_up: jax.Array, down: jax.Array, limit: float):
        """Packs gate_up ED2F and down EFD; `limit` is `model.swiglu_limit`."""
        self.limit = limit
        depth = down.shape[-1]
        both = gate_up.swapaxes(0, 1).reshape(depth, -1)  # ED2F -> D(E2F)
        self.gate_up = params.unsharded(packed_product.pack_columns(both))
        self.down = params.unsharded(packed_product.pack_sum(down.reshape(-1, depth)))  # (EF)D

    def __call__(self, tokens: jax.Array, scale: jax.Array) -> jax.Array:
        """Sum over all experts of their outputs for tokens MD, times scale EM -> MD."""
        both = packed_product.product(tokens, self.gate_up[...])  # (E2F)M
        both = both.reshape(scale.shape[0], -1, tokens.shape[0])  # E(2F)M
        hidden = scaled(swiglu(both, axis=1, limit=self.limit), scale[:, None])  # EFM
        return packed_product.sum_product(hidden.reshape(-1, tokens.shape[0]), self.down[...])


class PackedHead(nnx.Module):
    """Packed output head, in place of `Head`."""

    def __init__(self, table: jax.Array):
        """Packs table DV."""
        self.table = params.unsharded(packed_product.pack_columns(table))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x ...D -> logits ...V, float32."""
        table = self.table[...]
        rows = x.astype(table.dtype).reshape(-1, x.shape[-1])
        logits = packed_product.product(rows, table, jnp.float32).T
        return logits.reshape(*x.shape[:-1], -1)


class SplitKeyValueUp(nnx.Module):
    """Halves of kv_up, W^UK and W^UV, in the layout of absorbed decoding."""

    def __init__(self, kv_up: jax.Array, d_nope: int):
        """Splits kv_up CH(N+W)."""
        heads = kv_up.swapaxes(0, 1)
        self.key = params.unsharded(heads[..., :d_nope])  # HCN
        self.value = params.unsharded(heads[..., d_nope:])  # HCW


def pack_block(block: Any) -> None:
    """Adds packed weights to a `Block`, in place."""
    attention, feed = block.attention, block.feed
    attention.split_kv_up = nnx.data(SplitKeyValueUp(attention.kv_up[...], attention.config.d_nope))
    if block.dense:
        dense = [feed]
    else:
        experts = feed.experts
        packed = PackedExperts(experts.gate_up[...], experts.down[...], experts.swiglu_limit)
        experts.packed = nnx.data(packed)
        dense = [feed.shared] if feed.config.shared_experts else []
    for one in dense:
        packed = PackedExperts(one.gate_up[...][None], one.down[...][None], one.swiglu_limit)
        one.packed = nnx.data(packed)
