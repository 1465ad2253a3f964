"""One decoder layer: norm, attention, norm, feed-forward, each with its residual."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.mla import LatentAttention
from deepseek_jax.model.moe import FeedForward, MixtureOfExperts
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.router import Routing, joined


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

    def __call__(self, x: jax.Array, how: Execution) -> tuple[jax.Array, Routing | None]:
        """x BSD -> BSD, and the routing of a mixture of experts.

        Of several micro-batches each takes a step in turn, so that the attention of one and the
        experts of another stand beside the messages between them.
        """
        if self.dense:
            x = self.attend(x, how)
            return x + self.feed(self.feed_norm(x), how), None
        parts, sent = jnp.split(x, how.flights), []
        for i, part in enumerate(parts):
            parts[i] = self.attend(part, how)
            sent.append(self.feed.send(self.feed_norm(parts[i]), how))
        out = [self.feed.work(one, how) for one in sent]
        done = [self.feed.combine(*one, how) for one in zip(sent, out, strict=True)]
        x = jnp.concatenate([part + fed for part, (fed, _) in zip(parts, done, strict=True)])
        return x, joined([routing for _, routing in done])

    def attend(self, x: jax.Array, how: Execution) -> jax.Array:
        """x + MLA(norm x), BSD."""
        return checkpoint_name(x + self.attention(self.attention_norm(x), how), "attended")
