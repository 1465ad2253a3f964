"""Prefill and absorbed decoding with a latent cache, and drafts of MTP modules."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import packed_weights, params
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerStack:
    """Values, such as caches, of the stacks of layers; None for a stack that the model lacks.

    Attributes:
      dense, moe: values of the main model's dense layers and MoE layers.
      mtp: value of the MTP modules.
    """

    dense: Any
    moe: Any
    mtp: Any

    def admit(self, requests: jax.Array, kept: "PerStack") -> "PerStack":
        """Caches with the cache entries of new requests, for the stacks that `kept` has."""
        parts = (self.dense, kept.dense), (self.moe, kept.moe), (self.mtp, kept.mtp)
        return PerStack(
            *(past if new is None else past.admit(requests, new) for past, new in parts)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstacked:
    """`Transformer` whose layers have arrays of their own instead of being rows of stacks.

    A scan over a stack copies each layer's weights out of it, which takes most of the time of a
    step of few tokens. In exchange, the compiled program contains every layer. Attributes are those
    of `Transformer`, with tuples of layers.
    """

    embedding: Any
    dense_layers: tuple[Any, ...]
    moe_layers: tuple[Any, ...]
    norm: Any
    head: Any
    mtp: tuple[Any, ...]
    config: ModelConfig = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(cls, model: Transformer, *, on_cpu: bool = False) -> "Unstacked":
        """Copies every layer, with its placement.

        Args:
          on_cpu: packs weights for steps of few tokens on one CPU, see `model/packed_weights.py`.
        """
        config = model.config

        def layers(name: str, count: int) -> tuple[Any, ...]:
            return tuple(layer_of(getattr(model, name), i) for i in range(count))

        dense = layers("dense_layers", config.dense_layers)
        moe = layers("moe_layers", config.moe_layers)
        mtp = layers("mtp", config.mtp_depth)
        head: Any = model.head
        if on_cpu:
            for block in (*dense, *moe, *(module.block for module in mtp)):
                packed_weights.pack_block(block)
            head = packed_weights.PackedHead(model.head.table[...])
        return cls(model.embedding, dense, moe, model.norm, head, mtp, config)


Weights = Transformer | Unstacked


def layer_of(layers: Any, number: Any) -> Any:
    """Layer `number` of a tuple of layers, or of a stack."""
    if isinstance(layers, tuple):
        return layers[number]
    return jax.tree.map(lambda leaf: leaf[number], layers)


def run_layers(
    layers: Any, count: int, step: Callable[..., tuple[Any, Any]], carry: Any, unroll: int = 1
) -> tuple[Any, Any]:
    """Runs step(carry, layer, number) -> (carry, out) over the first `count` layers.

    Returns:
      The last carry, and the outs of all layers with a layer axis in front.
    """
    if isinstance(layers, tuple):
        outs = []
        for number in range(count):
            carry, out = step(carry, layers[number], number)
            outs.append(out)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *outs)
    first = jax.tree.map(lambda leaf: leaf[:count], layers)
    numbers = jnp.arange(count)
    return lax.scan(lambda carry, x: step(carry, *x), carry, (first, numbers), unroll=unroll)


def prefill(
    model: Weights, tokens: jax.Array, how: Execution, *, mtp: bool
) -> tuple[jax.Array, PerStack]:
    """Runs whole prompts from position 0, with the training form of attention.

    Args:
      tokens: BS int32; tokens after a prompt's end do not change the results before it.
      mtp: whether the MTP modules read the prompts too. Module k gets zeros for tokens past the
        end, so that its last k positions must be decoded again.

    Returns:
      BSD after the final norm, and the cache entries of each stack: LBSC and LBSR.
    """
    config = model.config
    embedded = params.whole(model.embedding)(tokens, how)
    x, dense, moe, ahead = embedded, None, None, None

    def step(x: jax.Array, layer: Any, _: Any) -> tuple[jax.Array, Any]:
        return params.whole(layer).prefill(x, how)

    if config.dense_layers:
        x, dense = run_layers(model.dense_layers, config.dense_layers, step, x, how.unroll)
    if config.moe_layers:
        x, moe = run_layers(model.moe_layers, config.moe_layers, step, x, how.unroll)
    hidden = params.whole(model.norm)(x)
    if mtp:
        padded = jnp.pad(embedded, ((0, 0), (0, config.mtp_depth), (0, 0)))

        def module(state: jax.Array, weights: Any, number: Any) -> tuple[jax.Array, Any]:
            token = lax.dynamic_slice_in_dim(padded, number + 1, tokens.shape[1], axis=1)
            return params.whole(weights).prefill(state, token, how)

        _, ahead = run_layers(model.mtp, config.mtp_depth, module, hidden)
    return hidden, PerStack(dense, moe, ahead)


def selected(model: Weights, tokens: jax.Array, how: Execution) -> tuple[jax.Array, ...]:
    """Positions that the indexer of each layer selects for tokens BS: BSK int32, of which -1 none.

    Those of the main model's layers, in order. All index scores of a layer are held at once.
    """
    config, found = model.config, []
    x = params.whole(model.embedding)(tokens, how)

    def step(x: jax.Array, layer: Any, _: Any) -> tuple[jax.Array, jax.Array]:
        own = params.whole(layer)
        return own.prefill(x, how)[0], own.attention.selected(own.attention_norm(x), how)

    stacks = ("dense_layers", config.dense_layers), ("moe_layers", config.moe_layers)
    for name, count in stacks:
        if count:
            x, positions = run_layers(getattr(model, name), count, step, x, how.unroll)
            found += list(positions)
    return tuple(found)


def decode(
    model: Weights, tokens: jax.Array, how: Execution, past: PerStack, positions: jax.Array
) -> tuple[jax.Array, PerStack]:
    """Absorbed decoding of tokens BS at `positions` BS -> BSD after the final norm, and the caches.

    The caches are carried from layer to layer, so that XLA updates them in place.
    """
    chex.assert_equal_shape([tokens, positions], custom_message="tokens and positions: BS int32")
    config, dense, moe = model.config, past.dense, past.moe
    x = params.whole(model.embedding)(tokens, how)

    def step(carry: tuple[jax.Array, Any], layer: Any, number: Any) -> tuple[Any, None]:
        x, past = carry
        return params.whole(layer).decode(x, how, past, number, positions), None

    if config.dense_layers:
        carry = x, dense
        (x, dense), _ = run_layers(model.dense_layers, config.dense_layers, step, carry, how.unroll)
    if config.moe_layers:
        (x, moe), _ = run_layers(model.moe_layers, config.moe_layers, step, (x, moe), how.unroll)
    return params.whole(model.norm)(x), dataclasses.replace(past, dense=dense, moe=moe)


def predict(
    model: Weights,
    module: Any,
    number: Any,
    hidden: jax.Array,
    tokens: jax.Array,
    how: Execution,
    past: PerStack,
    positions: jax.Array,
) -> tuple[jax.Array, jax.Array, PerStack]:
    """Absorbed decoding of one MTP module at `positions` BS.

    Args:
      module, number: weights of the module, and its number, from 0.
      hidden: BSD, state of the previous depth at these positions; for module 0 the main model's
        output after its final norm.
      tokens: BS int32, tokens number + 1 positions after `positions`.

    Returns:
      State for the next depth BSD, input of the head BSD, and the caches.
    """
    embedded = params.whole(model.embedding)(tokens, how)
    own = params.whole(module)
    state, out, mtp = own.decode(hidden, embedded, how, past.mtp, number, positions)
    return state, out, dataclasses.replace(past, mtp=mtp)
