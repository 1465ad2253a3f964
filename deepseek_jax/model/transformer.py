"""Transformer: embedding, dense layers, MoE layers, final norm, MTP modules, head."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.block import Block
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.mtp import MTPModule
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.router import Routing
from deepseek_jax.parallel import axes
from deepseek_jax.precision.einsum import exact_einsum, table_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trunk:
    """Output of the main model up to the head.

    Attributes:
      hidden: BSD, after the final norm.
      routing: routing of the MoE layers, stacked in front; None without MoE layers.
      embedded: B(S + ahead)D, the embeddings, which MTP modules read again.
      index_loss: () loss of the layers' indexers, summed over layers and queries; None without.
    """

    hidden: jax.Array
    routing: Routing | None
    embedded: jax.Array
    index_loss: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
    """Output of the main model and the MTP chain up to the head.

    Attributes:
      heads: (1 + depth)BSD, inputs of the head: of the main model, then of each MTP depth.
      routing: routing of the MoE layers, stacked in front; None without MoE layers.
      mtp_routing: routing of the MTP blocks, stacked in front; None without MTP.
      index_loss: () as in `Trunk`, with that of the MTP blocks.
    """

    heads: jax.Array
    routing: Routing | None
    mtp_routing: Routing | None
    index_loss: jax.Array | None = None


class Embedding(nnx.Module):
    """Token embedding, sharded over the vocabulary."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dims = (("vocab", config.vocab), ("model", config.d_model))
        self.table = params.weight(rngs, *dims, std=config.init_std)  # VD

    @jax.named_scope("embedding")
    def __call__(self, tokens: jax.Array, how: Execution) -> jax.Array:
        """tokens BS int -> BSD in the recipe's dtype."""
        chex.assert_rank(tokens, 2, custom_message="tokens: BS int")
        chex.assert_type(tokens, int)
        table, tokens = self.table[...], axes.fan_out(tokens, "vocab")
        here = tokens - table.shape[0] * axes.index("vocab")
        mine = (here >= 0) & (here < table.shape[0])
        rows = table_rows(table, jnp.where(mine, here, 0).reshape(-1))  # (BS)D
        rows = rows.reshape(*tokens.shape, -1)
        rows = jnp.where(mine[..., None], rows, jnp.zeros((), table.dtype))
        return axes.fan_in(rows.astype(how.recipe.activation_dtype), "vocab")


class Head(nnx.Module):
    """Output head, sharded over the vocabulary and shared by all prediction depths."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dims = (("model", config.d_model), ("vocab", config.vocab))
        self.table = params.weight(rngs, *dims, std=config.init_std)  # DV

    @jax.named_scope("head")
    def __call__(self, x: jax.Array) -> jax.Array:
        """x ...D -> logits ...V float32, of this device's shard of the vocabulary."""
        table = self.table[...]
        chex.assert_axis_dimension(x, -1, table.shape[0], custom_message="x: ...D")
        return exact_einsum("...D,DV->...V", x.astype(table.dtype), table)


class Transformer(nnx.Module):
    """DeepSeek-V3. Layers of one kind are stacked; a scan runs them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        def dense(rngs: nnx.Rngs) -> Block:
            return Block(config, dense=True, rngs=rngs)

        def mixture(rngs: nnx.Rngs) -> Block:
            return Block(config, dense=False, rngs=rngs)

        def predict(rngs: nnx.Rngs) -> MTPModule:
            return MTPModule(config, rngs=rngs)

        self.embedding = Embedding(config, rngs=rngs)
        if config.dense_layers:
            self.dense_layers = params.stack(config.dense_layers, dense, rngs)
        if config.moe_layers:
            self.moe_layers = params.stack(config.moe_layers, mixture, rngs)
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = Head(config, rngs=rngs)
        if config.mtp_depth:
            self.mtp = params.stack(config.mtp_depth, predict, rngs)
        self.config = config

    def trunk(self, tokens: jax.Array, how: Execution, *, ahead: int = 0) -> Trunk:
        """Main model; tokens B(S + ahead) int32, of which the last `ahead` are only embedded."""
        config = self.config
        embedded = params.whole(self.embedding)(tokens, how)
        x, routing = embedded[:, : tokens.shape[1] - ahead], None
        of_dense = of_moe = None
        if config.dense_layers:
            x, _, of_dense = _walk(self.dense_layers, x, how)
        if config.moe_layers:
            x, routing, of_moe = _walk(self.moe_layers, x, how)
        return Trunk(params.whole(self.norm)(x), routing, embedded, _total(of_dense, of_moe))

    def hidden(self, tokens: jax.Array, how: Execution, *, ahead: int = 0) -> Hidden:
        """Main model and MTP chain.

        Args:
          tokens: B(S + ahead) int32, of which only MTP modules read the last `ahead`. A module gets
            zeros for the embeddings of tokens past the end; its output there is meaningless.
        """
        return self.heads(self.trunk(tokens, how, ahead=ahead), how, ahead=ahead)

    def heads(self, trunk: Trunk, how: Execution, *, ahead: int) -> Hidden:
        """MTP chain on top of the main model."""
        depth = self.config.mtp_depth
        if not depth:
            return Hidden(trunk.hidden[None], trunk.routing, None, trunk.index_loss)
        missing, length = max(depth - ahead, 0), trunk.hidden.shape[1]
        embedded = jnp.pad(trunk.embedded, ((0, 0), (0, missing), (0, 0)))

        def predict(
            state: jax.Array, module_and_shift: tuple[MTPModule, jax.Array]
        ) -> tuple[jax.Array, tuple[jax.Array, Routing, jax.Array | None]]:
            module, shift = module_and_shift
            token = lax.dynamic_slice_in_dim(embedded, shift, length, axis=1)
            state, *out = params.whole(module)(state, token, how)
            return state, tuple(out)

        shifts = jnp.arange(1, depth + 1)
        _, (outs, mtp_routing, index_losses) = lax.scan(
            how.remat.layer(predict), trunk.hidden, (self.mtp, shifts)
        )
        heads = jnp.concatenate([trunk.hidden[None], outs])
        index_loss = _total(trunk.index_loss, index_losses)
        return Hidden(heads, trunk.routing, mtp_routing, index_loss)

    def __call__(self, tokens: jax.Array, how: Execution) -> tuple[jax.Array, Hidden]:
        """tokens BS -> logits (1 + depth)BSV float32 of all depths, and the head's inputs."""
        hidden = self.hidden(tokens, how)
        return self.head(hidden.heads), hidden


def build_model(config: ModelConfig, key: jax.Array) -> Transformer:
    """Model with random weights, float32."""
    return Transformer(config, rngs=nnx.Rngs(params=key))


def abstract_model(config: ModelConfig) -> Transformer:
    """Model of shapes, dtypes and logical axes; no array is allocated."""
    own: Transformer = jax.tree.map(
        lambda leaf: leaf, _abstract(config, jax.sharding.get_abstract_mesh())
    )
    return own


@functools.lru_cache(maxsize=8)
def _abstract(config: ModelConfig, mesh: Any) -> Transformer:
    """The abstract model under a mesh, traced once; a start asks for it several times."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: build_model(config, key), key)


def _walk(
    layers: Any, x: jax.Array, how: Execution
) -> tuple[jax.Array, Routing | None, jax.Array | None]:
    """Runs x BSD through a stack of blocks; the routings and the indexers' losses are stacked."""

    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        x, routing, index_loss = params.whole(layer)(x, how)
        return x, (routing, index_loss)

    x, (routing, index_losses) = lax.scan(how.remat.layer(step), x, layers, unroll=how.unroll)
    return x, routing, index_losses


def _total(*losses: jax.Array | None) -> jax.Array | None:
    """Sum of the indexers' losses of some layers; None without any."""
    parts = [loss.sum() for loss in losses if loss is not None]
    return sum(parts[1:], parts[0]) if parts else None
