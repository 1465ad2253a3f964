"""The whole model: embedding, dense layers, MoE layers, final norm, MTP modules, head."""

import dataclasses
from typing import Any

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
    """The main model up to the head.

    Attributes:
      top: BSD, after the final norm.
      routing: of the MoE layers, stacked in front; None where there are none.
      embedded: B(S + ahead)D, the embeddings, which MTP modules read again.
    """

    top: jax.Array
    routing: Routing | None
    embedded: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
    """Everything up to the head.

    Attributes:
      heads: (1 + depth)BSD, what the head reads: after the main model's final norm, then after
        each MTP depth's.
      routing: of the MoE layers, stacked in front; None where there are none.
      mtp_routing: the same of the MTP blocks.
    """

    heads: jax.Array
    routing: Routing | None
    mtp_routing: Routing | None


class Embedding(nnx.Module):
    """The input table, split over the vocabulary."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dims = (("vocab", config.vocab), ("model", config.d_model))
        self.table = params.weight(rngs, *dims, std=config.init_std)  # VD

    @jax.named_scope("embedding")
    def __call__(self, tokens: jax.Array, how: Execution) -> jax.Array:
        """tokens BS int -> BSD in the recipe's dtype."""
        table, tokens = self.table[...], axes.fan_out(tokens, "vocab")
        here = tokens - table.shape[0] * axes.index("vocab")
        mine = (here >= 0) & (here < table.shape[0])
        rows = table_rows(table, jnp.where(mine, here, 0).reshape(-1))  # (BS)D
        rows = rows.reshape(*tokens.shape, -1)
        rows = jnp.where(mine[..., None], rows, jnp.zeros((), table.dtype))
        return axes.fan_in(rows.astype(how.recipe.activation_dtype), "vocab")


class Head(nnx.Module):
    """The output table, split over the vocabulary; shared by all prediction depths."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dims = (("model", config.d_model), ("vocab", config.vocab))
        self.table = params.weight(rngs, *dims, std=config.init_std)  # DV

    @jax.named_scope("head")
    def __call__(self, x: jax.Array) -> jax.Array:
        """x ...D -> this device's logits ...V, float32."""
        table = self.table[...]
        return exact_einsum("...D,DV->...V", x.astype(table.dtype), table)


class Transformer(nnx.Module):
    """DeepSeek-V3. Layers of one kind are stacked and walked by a scan."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        def dense(rngs):
            return Block(config, dense=True, rngs=rngs)

        def mixture(rngs):
            return Block(config, dense=False, rngs=rngs)

        def predict(rngs):
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
        """tokens B(S + ahead) int32; the last `ahead` are only embedded."""
        config = self.config
        embedded = params.whole(self.embedding)(tokens, how)
        x, routing = embedded[:, : tokens.shape[1] - ahead], None
        if config.dense_layers:
            x, _ = _walk(self.dense_layers, x, how)
        if config.moe_layers:
            x, routing = _walk(self.moe_layers, x, how)
        return Trunk(params.whole(self.norm)(x), routing, embedded)

    def hidden(self, tokens: jax.Array, how: Execution, *, ahead: int = 0) -> Hidden:
        """The trunk and the MTP chain.

        Args:
          tokens: B(S + ahead) int32; the last `ahead` are read by MTP modules only. Where a module
            needs a token past the end it gets zeros, and its output there means nothing.
        """
        return self.heads(self.trunk(tokens, how, ahead=ahead), how, ahead=ahead)

    def heads(self, trunk: Trunk, how: Execution, *, ahead: int) -> Hidden:
        """The MTP chain on top of a trunk."""
        depth = self.config.mtp_depth
        if not depth:
            return Hidden(trunk.top[None], trunk.routing, None)
        missing, length = max(depth - ahead, 0), trunk.top.shape[1]
        embedded = jnp.pad(trunk.embedded, ((0, 0), (0, missing), (0, 0)))

        def predict(state, module_and_shift):
            module, shift = module_and_shift
            token = lax.dynamic_slice_in_dim(embedded, shift, length, axis=1)
            state, out, routing = params.whole(module)(state, token, how)
            return state, (out, routing)

        shifts = jnp.arange(1, depth + 1)
        _, (outs, mtp_routing) = lax.scan(how.remat.layer(predict), trunk.top, (self.mtp, shifts))
        return Hidden(jnp.concatenate([trunk.top[None], outs]), trunk.routing, mtp_routing)

    def __call__(self, tokens: jax.Array, how: Execution) -> tuple[jax.Array, Hidden]:
        """tokens BS -> logits (1 + depth)BSV float32 of every head, and what led to them."""
        hidden = self.hidden(tokens, how)
        return self.head(hidden.heads), hidden


def build_model(config: ModelConfig, key: jax.Array) -> Transformer:
    return Transformer(config, rngs=nnx.Rngs(params=key))


def abstract_model(config: ModelConfig) -> Transformer:
    """Shapes, dtypes and logical axes of every parameter; nothing is allocated."""
    return jax.eval_shape(lambda key: build_model(config, key), jax.random.key(0))


def _walk(layers: Any, x: jax.Array, how: Execution) -> tuple[jax.Array, Routing | None]:
    """x through a stack of blocks, one after another; their routings stacked."""

    def step(x, layer):
        return params.whole(layer)(x, how)

    return lax.scan(how.remat.layer(step), x, layers, unroll=how.unroll)
