"""The model with a memory of earlier tokens: a prompt fills it, decoding goes on from it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model import params
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.mla import Past
from deepseek_jax.model.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacks:
    """Something for each stack of layers; None where the model has no such layers.

    Attributes:
      dense, moe: of the main model.
      mtp: of the MTP modules.
    """

    dense: Any
    moe: Any
    mtp: Any

    def admit(self, requests: jax.Array, kept: "Stacks") -> "Stacks":
        """With what `prefill` keeps of these requests, in the stacks that it has."""
        parts = (self.dense, kept.dense), (self.moe, kept.moe), (self.mtp, kept.mtp)
        return Stacks(*(past if new is None else past.admit(requests, new) for past, new in parts))


def prefill(
    model: Transformer, tokens: jax.Array, how: Execution, *, mtp: bool
) -> tuple[jax.Array, Stacks]:
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

    def step(x, layer):
        return params.whole(layer).prefill(x, how)

    if config.dense_layers:
        x, dense = lax.scan(step, x, model.dense_layers, unroll=how.unroll)
    if config.moe_layers:
        x, moe = lax.scan(step, x, model.moe_layers, unroll=how.unroll)
    top = params.whole(model.norm)(x)
    if mtp:
        padded = jnp.pad(embedded, ((0, 0), (0, config.mtp_depth), (0, 0)))

        def predict(state, module_and_shift):
            module, shift = module_and_shift
            token = lax.dynamic_slice_in_dim(padded, shift, tokens.shape[1], axis=1)
            return params.whole(module).prefill(state, token, how)

        _, ahead = lax.scan(predict, top, (model.mtp, jnp.arange(1, config.mtp_depth + 1)))
    return top, Stacks(dense, moe, ahead)


def decode(
    model: Transformer, tokens: jax.Array, how: Execution, past: Stacks, positions: jax.Array
) -> tuple[jax.Array, Stacks]:
    """Tokens BS at `positions` BS, through the absorbed form -> BSD after the final norm."""
    config, dense, moe = model.config, past.dense, past.moe
    x = params.whole(model.embedding)(tokens, how)
    if config.dense_layers:
        x, dense = _walk(model.dense_layers, config.dense_layers, x, how, dense, positions)
    if config.moe_layers:
        x, moe = _walk(model.moe_layers, config.moe_layers, x, how, moe, positions)
    return params.whole(model.norm)(x), dataclasses.replace(past, dense=dense, moe=moe)


def predict(
    model: Transformer,
    module: Any,
    hidden: jax.Array,
    tokens: jax.Array,
    how: Execution,
    past: Stacks,
    positions: jax.Array,
) -> tuple[jax.Array, jax.Array, Stacks]:
    """One MTP module, counted from 0, at `positions` BS.

    Args:
      hidden: BSD, what the depth before it knew there: the state, or the main model's top.
      tokens: BS, those that stand module + 1 positions later.

    Returns:
      The state for the next depth and what the head reads, BSD.
    """
    own = params.whole(jax.tree.map(lambda leaf: leaf[module], model.mtp))
    embedded = params.whole(model.embedding)(tokens, how)
    state, out, mtp = own.decode(hidden, embedded, how, past.mtp, module, positions)
    return state, out, dataclasses.replace(past, mtp=mtp)


def _walk(
    layers: Any, count: int, x: jax.Array, how: Execution, past: Past, positions: jax.Array
) -> tuple[jax.Array, Past]:
    """x through a stack of blocks; what they keep is carried, so that it is changed in place."""

    def step(carry, layer_and_number):
        x, past = carry
        layer, number = layer_and_number
        return params.whole(layer).decode(x, how, past, number, positions), None

    return lax.scan(step, (x, past), (layers, jnp.arange(count)), unroll=how.unroll)[0]
