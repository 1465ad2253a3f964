"""Multi-token prediction (MTP): section 2.2 of the report, equations 21 to 23.

The loss of all depths is in `loss.py`.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.block import Block
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.mla import Kept, Past
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.router import Routing


class MTPModule(nnx.Module):
    """MTP module of depth k: predicts token i+k+1 from depth k-1's state at i and token i+k.

    Embedding and head are the main model's. The projection M reads [embedding ; hidden], the order
    of the released weights. The state of depth 0 is the main model's output after its final norm.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embedding_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.hidden_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        halves = ((None, 2), ("model", config.d_model), (None, config.d_model))
        self.project = params.weight(
            rngs, *halves, std=config.init_std, roles="iio"
        )  # 2DD, embedding first
        self.block = Block(config, dense=False, rngs=rngs)
        self.out_norm = RMSNorm(config.d_model, eps=config.norm_eps)

    @jax.named_scope("mtp")
    def __call__(
        self, hidden: jax.Array, embedding: jax.Array, how: Execution
    ) -> tuple[jax.Array, jax.Array, Routing, jax.Array | None]:
        """hidden and embedding BSD -> (state for the next depth, input of the head), both BSD.

        And the routing and the indexer's loss of the block.
        """
        state, routing, index_loss = self.block(self._joined(hidden, embedding, how), how)
        assert routing is not None
        return state, self.out_norm(state), routing, index_loss

    @jax.named_scope("mtp")
    def prefill(
        self, hidden: jax.Array, embedding: jax.Array, how: Execution
    ) -> tuple[jax.Array, Kept]:
        """State for the next depth, BSD, and the block's cache entries."""
        return self.block.prefill(self._joined(hidden, embedding, how), how)

    @jax.named_scope("mtp")
    def decode(
        self,
        hidden: jax.Array,
        embedding: jax.Array,
        how: Execution,
        past: Past,
        layer: Any,
        positions: jax.Array,
    ) -> tuple[jax.Array, jax.Array, Past]:
        """State for the next depth and input of the head, BSD; see `LatentAttention.decode`."""
        joined = self._joined(hidden, embedding, how)
        state, past = self.block.decode(joined, how, past, layer, positions)
        return state, self.out_norm(state), past

    def _joined(self, hidden: jax.Array, embedding: jax.Array, how: Execution) -> jax.Array:
        return join(*self.joining(), hidden, embedding, how)

    def joining(self) -> tuple[RMSNorm, RMSNorm, jax.Array]:
        """Weights that `join` takes."""
        return self.embedding_norm, self.hidden_norm, self.project[...]


def join(
    embedding_norm: RMSNorm,
    hidden_norm: RMSNorm,
    project: jax.Array,
    hidden: jax.Array,
    embedding: jax.Array,
    how: Execution,
) -> jax.Array:
    """Input of the block, BSD: equation 21 as M [norm(embedding) ; norm(hidden)].

    The report has the halves the other way round; this is the order of the released weights.
    """
    chex.assert_shape(hidden, (None, None, project.shape[-1]), custom_message="hidden: BSD")
    chex.assert_equal_shape([hidden, embedding], custom_message="hidden and embedding: BSD")
    chex.assert_type([hidden, embedding], float)
    halves = jnp.stack([embedding_norm(embedding), hidden_norm(hidden)])  # XBSD
    return how.recipe.einsum("XBSD,XDY->BSY", halves, project)
