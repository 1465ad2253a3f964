"""Decoder layer: norm, attention, norm, feed-forward, each with its residual."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.mla import Kept, LatentAttention, Past, attend
from deepseek_jax.model.moe import FeedForward, MixtureOfExperts
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.overlapped import two_batch
from deepseek_jax.model.router import Routing


class Block(nnx.Module):
    """x + MLA(norm x), then + FFN(norm x), where the FFN is dense or a mixture of experts."""

    def __init__(self, config: ModelConfig, *, dense: bool, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = LatentAttention(config, rngs=rngs)
        self.feed_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.feed: Any
        if dense:
            self.feed = FeedForward(config, ("dense_width", config.d_dense), rngs=rngs)
        else:
            self.feed = MixtureOfExperts(config, rngs=rngs)
        self.dense = dense

    @jax.named_scope("layer")
    def __call__(
        self, x: jax.Array, how: Execution
    ) -> tuple[jax.Array, Routing | None, jax.Array | None]:
        """x BSD -> BSD; the routing, None for a dense layer; and the indexer's loss, () or None."""
        if how.in_flight > 1 and not self.dense:
            x, routing = two_batch.layer(self, x, how)
            return x, dataclasses.replace(routing, index_loss=None), routing.index_loss
        x, index_loss = attend(self.attention_norm, self.attention, x, how)
        return *self._add_feed_forward(x, how), index_loss

    @jax.named_scope("layer")
    def prefill(self, x: jax.Array, how: Execution) -> tuple[jax.Array, Kept]:
        """x BSD -> BSD, and the cache entries of these tokens."""
        mixed, kept = self.attention.prefill(self.attention_norm(x), how)
        x = x + mixed
        return x + self.feed.decode(self.feed_norm(x), how), kept  # a short prompt is few tokens

    @jax.named_scope("layer")
    def decode(
        self, x: jax.Array, how: Execution, past: Past, layer: Any, positions: jax.Array
    ) -> tuple[jax.Array, Past]:
        """x BSD of tokens at `positions` BS -> BSD, see `LatentAttention.decode`."""
        mixed, past = self.attention.decode(self.attention_norm(x), how, past, layer, positions)
        x = x + mixed
        return x + self.feed.decode(self.feed_norm(x), how), past

    def _add_feed_forward(self, x: jax.Array, how: Execution) -> tuple[jax.Array, Routing | None]:
        """x + FFN(norm x)."""
        if self.dense:
            return x + self.feed(self.feed_norm(x), how), None
        out, routing = self.feed(self.feed_norm(x), how)
        return x + out, routing
