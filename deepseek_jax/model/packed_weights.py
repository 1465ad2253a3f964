"""A model whose weights lie as few tokens read them fastest on one CPU.

Decoding a few tokens costs what it takes to read all weights. So those that weigh most are cut
once, when a model is opened, into strips (`precision/packed_product.py`), beside the ones that
prompts are read with; and the two halves of kv_up are taken apart, which else each step does again.

E experts, M tokens, D model width, F hidden width, V vocabulary, H heads, C latent, N and W widths
of a head's key and value.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model import params
from deepseek_jax.model.moe import scaled_rows, swiglu
from deepseek_jax.precision import packed_product


class PackedExperts(nnx.Module):
    """The SwiGLU networks of E experts."""

    def __init__(self, gate_up: jax.Array, down: jax.Array):
        """From ED2F and EFD."""
        both = gate_up.reshape(*gate_up.shape[:2], -1)  # ED2F -> ED(2F)
        self.gate_up = params.whole_here(packed_product.pack(both))
        self.down = params.whole_here(packed_product.pack(down))

    def __call__(self, tokens: jax.Array, scale: jax.Array) -> jax.Array:
        """The sum of what all experts make of MD, times EM -> MD."""
        rows = jnp.broadcast_to(tokens, (scale.shape[0], *tokens.shape))
        hidden = swiglu(packed_product.packed_product(rows, self.gate_up[...]))
        out = packed_product.packed_product(scaled_rows(hidden, scale), self.down[...])
        return out.astype(jnp.float32).sum(0).astype(tokens.dtype)


class PackedHead(nnx.Module):
    """In the place of the model's own."""

    def __init__(self, table: jax.Array):
        """From DV."""
        self.table = params.whole_here(packed_product.pack(table[None]))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x ...D -> logits ...V, float32."""
        table = self.table[...]
        rows = x.astype(table.dtype).reshape(1, -1, x.shape[-1])
        logits = packed_product.packed_product(rows, table, jnp.float32)
        return logits.reshape(*x.shape[:-1], -1)


class SplitKeyValueUp(nnx.Module):
    """kv_up as the absorbed form reads it."""

    def __init__(self, kv_up: jax.Array, d_nope: int):
        """From CH(N+W)."""
        key, value = jnp.split(kv_up.swapaxes(0, 1), [d_nope], axis=-1)
        self.key, self.value = params.whole_here(key), params.whole_here(value)  # HCN, HCW


def pack_block(block: Any) -> None:
    """Gives a `Block` its weights as above, too."""
    attention, feed = block.attention, block.feed
    attention.split_kv_up = nnx.data(SplitKeyValueUp(attention.kv_up[...], attention.config.d_nope))
    if block.dense:
        dense = [feed]
    else:
        experts = feed.experts
        experts.packed = nnx.data(PackedExperts(experts.gate_up[...], experts.down[...]))
        dense = [feed.shared] if feed.config.shared_experts else []
    for one in dense:
        one.packed = nnx.data(PackedExperts(one.gate_up[...][None], one.down[...][None]))
