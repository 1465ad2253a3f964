"""Programs of the engine: prefill of new requests, and decoding of all request slots.

Each runs in one `shard_map` over the training mesh: request slots over the data axes; experts,
heads and vocabulary as in training. The functions are written for one device's part.

B request slots, N decoding steps, S tokens of a step, D model width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model import decoding, params
from deepseek_jax.model.decoding import Weights
from deepseek_jax.model.execution import Execution
from deepseek_jax.parallel import axes
from deepseek_jax.serve import sampling
from deepseek_jax.serve.batch_state import Admission, State

# A decoding step: state -> state, tokens BS, and B the number of them offered to each request slot.
Step = Callable[[Weights, Execution, State], tuple[State, jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """Tokens made by one call, the same on all devices; B counts the slots of all devices.

    Attributes:
      tokens: NBS int32.
      count: NB int32, tokens of S that were appended to each slot.
      offered: NB int32, tokens that were made for each slot, before limit and stop token cut them.
      running: B bool, True for a request that has not ended after the last step.
    """

    tokens: jax.Array
    count: jax.Array
    offered: jax.Array
    running: jax.Array


def logits_of(model: Weights, rows: jax.Array) -> jax.Array:
    """Logits of hidden states: B...D -> B...V float32, over the whole vocabulary."""
    logits = params.whole(model.head)(axes.fan_out(rows, "vocab"))
    return axes.own(axes.join(logits, "vocab", rows.ndim - 1), "vocab")


def admit(
    model: Weights, how: Execution, state: State, new: Admission, stop: tuple[int, ...]
) -> tuple[State, StepOutput]:
    """Prefills the prompts of new requests and samples their first tokens."""
    window = state.hidden_window.shape[1]
    hidden, kept = decoding.prefill(model, new.prompts, how, mtp=window > 0)
    ends = jnp.maximum(new.lengths - 1, 0)
    last = jnp.take_along_axis(hidden, ends[:, None, None], axis=1)[:, 0]
    first = sampling.choose(logits_of(model, last), new.settings, new.lengths)

    cache = state.cache.admit(new.rows, kept)
    slots = new.into(state.slots)
    recent = jnp.maximum(ends[:, None] + 1 - window + jnp.arange(window)[None], 0)
    recent = jnp.take_along_axis(hidden, recent[..., None], axis=1)
    hidden_window = state.hidden_window.at[new.rows].set(recent, mode="drop")
    token = jnp.zeros_like(slots.length).at[new.rows].set(first, mode="drop")
    one = jnp.zeros_like(slots.length).at[new.rows].set(1, mode="drop")
    slots, count = slots.extended(token[:, None], one, stop)
    state = State(slots, cache, hidden_window)
    return state, _step_output(state, token[None, :, None], count[None], one[None])


def plain_step(model: Weights, how: Execution, state: State) -> tuple[State, jax.Array, jax.Array]:
    """Decodes one token per request; a `Step`."""
    slots = state.slots
    position = slots.last[:, None]
    hidden, cache = decoding.decode(model, slots.at(position), how, state.cache, position)
    token = sampling.choose(logits_of(model, hidden[:, 0]), slots.settings, slots.length)
    count = jnp.ones_like(slots.length)
    return dataclasses.replace(state, cache=cache), token[:, None], count


def multi_step(
    step: Step,
    steps: int,
    width: int,
    model: Weights,
    how: Execution,
    state: State,
    stop: tuple[int, ...],
) -> tuple[State, StepOutput]:
    """Runs up to `steps` decoding steps, and stops early when no request of any device runs.

    Args:
      step: Decoding step.
      steps: N.
      width: S, most tokens of a step.
      model: Weights.
      how: Execution of the forward pass.
      state: State of this device.
      stop: Tokens that end a request.
    """
    batch = state.slots.length.shape[0]

    def one(carry):
        number, _, state, tokens, counts, offered = carry
        state, made, offer = step(model, how, state)
        offer = jnp.where(state.slots.running, offer, 0)
        slots, count = state.slots.extended(made, offer, stop)
        return (
            number + 1,
            axes.anywhere(slots.running.any(), "batch"),
            dataclasses.replace(state, slots=slots),
            lax.dynamic_update_index_in_dim(tokens, made, number, 0),
            lax.dynamic_update_index_in_dim(counts, count, number, 0),
            lax.dynamic_update_index_in_dim(offered, offer, number, 0),
        )

    zeros = jnp.zeros((steps, batch), jnp.int32)
    start = (
        jnp.int32(0),
        axes.anywhere(state.slots.running.any(), "batch"),
        state,
        jnp.zeros((steps, batch, width), jnp.int32),
        zeros,
        zeros,
    )
    end = lax.while_loop(lambda carry: (carry[0] < steps) & carry[1], one, start)
    _, _, state, tokens, counts, offered = end
    return state, _step_output(state, tokens, counts, offered)


def _step_output(
    state: State, tokens: jax.Array, count: jax.Array, offered: jax.Array
) -> StepOutput:
    """Output of all devices, gathered over the batch axis."""
    tokens, count, offered = (axes.join(x, "batch", 1) for x in (tokens, count, offered))
    return StepOutput(tokens, count, offered, axes.join(state.slots.running, "batch", 0))
