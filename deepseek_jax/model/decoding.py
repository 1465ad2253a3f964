"""The model with a memory of earlier tokens: a prompt fills it, decoding goes on from it."""

import dataclasses
from typing import Any

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
    """Something for each stack of layers; None where the model has no such layers.

    Attributes:
      dense, moe: of the main model.
      mtp: of the MTP modules.
    """

    dense: Any
    moe: Any
    mtp: Any

    def admit(self, requests: jax.Array, kept: "PerStack") -> "PerStack":
        """With what `prefill` keeps of these requests, in the stacks that it has."""
        parts = (self.dense, kept.dense), (self.moe, kept.moe), (self.mtp, kept.mtp)
        return PerStack(
            *(past if new is None else past.admit(requests, new) for past, new in parts)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstacked:
    """A `Transformer` whose layers are arrays of their own, and not parts of stacks.

    A loop over a stack copies each layer's weights out of it, which a step of few tokens spends
    most of its time on; but the program then holds every layer. Attributes are as there, with
    tuples of layers.
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
        """Copies every layer; where it is placed stays the same.

        Args:
          on_cpu: lays out weights for few tokens on one CPU, see `model/packed_weights.py`.
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
    """One of a tuple of layers, or of a stack."""
    if isinstance(layers, tuple):
        return layers[number]
    return jax.tree.map(lambda leaf: leaf[number], layers)


def run_layers(layers: Any, count: int, step: Any, carry: Any, unroll: int = 1) -> tuple[Any, Any]:
    """step(carry, layer, its number) -> (carry, out) for the first `count` layers, one by one.

    Returns:
      The carry, and the layers' outs with a layer axis in front.
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
    """Whole prompts, from position 0, through the form of attention that is trained.

    Args:
      tokens: BS int32; what stands after a prompt's end changes nothing before it.
      mtp: whether the MTP modules read them too. Where module k needs a token past the end it gets
        zeros, so its last k positions are to be decoded again.

    Returns:
      BSD after the final norm, and what each stack keeps: LBSC and LBSR.
    """
    config = model.config
    embedded = params.whole(model.embedding)(tokens, how)
    x, dense, moe, ahead = embedded, None, None, None

    def step(x, layer, _):
        return params.whole(layer).prefill(x, how)

    if config.dense_layers:
        x, dense = run_layers(model.dense_layers, config.dense_layers, step, x, how.unroll)
    if config.moe_layers:
        x, moe = run_layers(model.moe_layers, config.moe_layers, step, x, how.unroll)
    top = params.whole(model.norm)(x)
    if mtp:
        padded = jnp.pad(embedded, ((0, 0), (0, config.mtp_depth), (0, 0)))

        def module(state, weights, number):
            token = lax.dynamic_slice_in_dim(padded, number + 1, tokens.shape[1], axis=1)
            return params.whole(weights).prefill(state, token, how)

        _, ahead = run_layers(model.mtp, config.mtp_depth, module, top)
    return top, PerStack(dense, moe, ahead)


def decode(
    model: Weights, tokens: jax.Array, how: Execution, past: PerStack, positions: jax.Array
) -> tuple[jax.Array, PerStack]:
    """Tokens BS at `positions` BS, through the absorbed form -> BSD after the final norm.

    What layers keep is carried from one to the next, so that it is changed in place.
    """
    config, dense, moe = model.config, past.dense, past.moe
    x = params.whole(model.embedding)(tokens, how)

    def step(carry, layer, number):
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
    """One MTP module, counted from 0, at `positions` BS.

    Args:
      module, number: its weights, and which it is.
      hidden: BSD, what the depth before it knew there: the state, or the main model's top.
      tokens: BS, those that stand number + 1 positions later.

    Returns:
      The state for the next depth and what the head reads, BSD.
    """
    embedded = params.whole(model.embedding)(tokens, how)
    own = params.whole(module)
    state, out, mtp = own.decode(hidden, embedded, how, past.mtp, number, positions)
    return state, out, dataclasses.replace(past, mtp=mtp)
