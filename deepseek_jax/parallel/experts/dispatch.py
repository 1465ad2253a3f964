"""Dispatch of tokens to their experts and combination of the results (section 3.2.2).

A dispatch has two steps with the experts between them, so that other work can overlap with each:

  send     every (token, chosen expert) reaches the device of its expert;
  combine  the experts' results return, summed wherever copies of one token meet.

`two_hop` sends a token once to each chosen node, to the GPU of the sender's index in that node, and
from there to the chosen GPUs of the node; on the way back results are summed on each GPU, then on
each node, then on the sender. `flat` sends to each chosen GPU directly. The two differ only in
their hops: a hop is one all-to-all, in one message for all that travels. `reference`
(`reference.py`) has every expert see every token.

Buffers hold the capacity factor times the mean load. A choice without a slot is not dropped: it
stays with its token, and `overflow.py` sends it in further rounds of the same exchange.

M tokens of this device, K chosen experts of each, E experts in all, D model width, S slots for the
copies that this device's experts work on, R slots of a hop's buffer, W words of a row.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import Config, buffer_slots, most_nodes
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.experts import message, permutation
from deepseek_jax.parallel.experts.exchange import Dispatch, Exchange, Received, cotangent
from deepseek_jax.parallel.experts.message import Field
from deepseek_jax.parallel.experts.permutation import Permutation
from deepseek_jax.parallel.experts.reference import ReferenceDispatch
from deepseek_jax.parallel.overlap import Steps, run_to_end
from deepseek_jax.precision.linear_input import TiledArray, empty_like, numbers
from deepseek_jax.precision.payload import UNCHANGED_PAYLOAD, Payload
from deepseek_jax.precision.recipes import FLOAT32, Recipe
from deepseek_jax.precision.saved import Saved, save


@dataclasses.dataclass(frozen=True)
class Hop:
    """All-to-all of a dispatch.

    Attributes:
      over: mesh axes.
      parts: devices along these axes.
      slots: slots of each lane, the part of the buffer that goes to one device.
    """

    over: tuple[str, ...]
    parts: int
    slots: int

    def exchange(self, words: jax.Array) -> Steps[jax.Array]:
        """Sends lane i of RW words to device i, and returns RW, whose lane i came from device i.

        One step, which ends when the message has arrived.
        """
        lanes = words.reshape(self.parts, self.slots, -1)
        arrived = yield lax.all_to_all(lanes, self.over, 0, 0, tiled=True)
        return arrived.reshape(words.shape)


@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """Sizes of one exchange, known before it is compiled.

    Attributes:
      hops: outermost first; none where all experts are on this device.
      total: E.
      slots: S.
      likely: slots of the S that a balanced router fills.
    """

    hops: tuple[Hop, ...]
    total: int
    slots: int
    likely: int

    @property
    def here(self) -> int:
        """Number of experts on one device."""
        return self.total // math.prod(hop.parts for hop in self.hops)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Route:
    """Slots that copies of tokens took on every hop, and before the local experts."""

    hops: tuple[Permutation, ...]
    local: Permutation
    plan: ExchangePlan = dataclasses.field(metadata=dict(static=True))


@dataclasses.dataclass(frozen=True)
class AllToAllDispatch:
    """The dispatch that sends one copy for each (token, destination) of a hop.

    Attributes:
      separate_gpu_hop: whether the `gpu` axis is a hop of its own, after all others.
      capacity_factor: slots, as a multiple of those that a balanced router fills.
      most_nodes: largest number of destinations of one token on the first of two hops.
      payload: encoding in which tokens travel.
    """

    separate_gpu_hop: bool
    capacity_factor: float
    most_nodes: int
    payload: Payload

    def hop_axes(self) -> list[tuple[str, ...]]:
        """Mesh axes of each hop, outermost first."""
        over = axes.names("experts")
        fast = tuple(name for name in over if self.separate_gpu_hop and name == "gpu")
        return [group for group in (tuple(n for n in over if n not in fast), fast) if group]

    def plan(self, tokens: int, top_k: int, total: int) -> ExchangePlan:
        """Sizes of an exchange of so many tokens, choices of each and experts."""
        groups = self.hop_axes()
        parts = tuple(axes.devices(group) for group in groups)
        *lanes, slots = buffer_slots(
            self.capacity_factor, tokens, top_k, total, parts, self.most_nodes
        )
        hops = tuple(Hop(*hop) for hop in zip(groups, parts, lanes, strict=True))
        return ExchangePlan(hops, total, slots, min(slots, tokens * top_k))

    @property
    def in_steps(self) -> "AllToAllDispatch":
        """This dispatch itself."""
        return self

    def complete(self, tokens: int, top_k: int, total: int) -> bool:
        """Whether the buffers hold whatever a router may choose, so that one round serves all."""
        plan, rows = self.plan(tokens, top_k, total), tokens
        for hop in plan.hops:
            if hop.slots < rows:
                return False
            rows = hop.parts * hop.slots
        return plan.slots >= rows * min(top_k, plan.here)

    def unbounded(self) -> "AllToAllDispatch":
        """The same dispatch with buffers for any router at all: for few tokens, that is little."""
        return dataclasses.replace(self, capacity_factor=math.inf)

    def send(self, exchange: Exchange) -> Received:
        """Tokens to their experts; see `exchange.Dispatch`."""
        return _send(self, dataclasses.replace(exchange, experts=None))

    def combine(self, out: jax.Array | TiledArray, route: Route) -> tuple[jax.Array, jax.Array]:
        """Experts' results to their tokens; see `exchange.Dispatch`."""
        return _combine(self, out, route)

    # The same with a step for each hop, and the gradients: see `exchange.SteppedDispatch`.

    def sending(self, exchange: Exchange) -> Steps[Received]:
        """`send` in steps. Rows are as they travel: `payload.received` makes numbers of them."""
        (count, top_k), total = exchange.chosen.shape, exchange.total
        plan = self.plan(count, top_k, total)
        expert_names = jnp.where(exchange.left, exchange.chosen + 1, NO_EXPERT).astype(
            id_dtype(total)
        )
        sent: Any = (*self.payload.encode(exchange.tokens), exchange.weights, expert_names)
        fields, words = [Field.of(x) for x in sent], message.pack(sent)
        first, span, slow_hop_words = jnp.int32(0), total, None
        permutations: list[Permutation] = []
        for hop in plan.hops:
            if permutations:
                slow_hop_words = words[:, : _width(fields[:-2])]
            ids = _local_ids(message.unpack(words, fields)[-1], first, span)
            span //= hop.parts
            hop_permutation = permutation.lanes(
                jnp.where(ids < 0, hop.parts, ids // span), hop.parts, hop.slots
            )
            words = yield from hop.exchange(hop_permutation.permute(words))
            first += lax.axis_index(hop.over) * span
            permutations.append(hop_permutation)
        *_, weights, expert_names = message.unpack(words, fields)
        local, sizes = permutation.sorted_by_expert(
            _local_ids(expert_names, first, span), plan.here, plan.slots
        )
        route = save(Saved.ROUTE, Route(tuple(permutations), local, plan))
        rows, weights = permute_rows(local, words, fields[:-2]), local.permute_choices(weights)
        rows, weights = save(Saved.ARRIVED, (rows, weights))
        return Received(rows, weights, save(Saved.ROUTE, sizes), route, plan.likely, slow_hop_words)

    def send_gradient(
        self, d_rows: jax.Array, d_weights: jax.Array, route: Route
    ) -> Steps[tuple[jax.Array, jax.Array]]:
        """Gradients of SD and S -> those of MD and MK."""
        return (
            yield from self._reverse_hops(d_rows, route.local.unpermute_choices(d_weights), route)
        )

    def combining(self, out: jax.Array, route: Route) -> Steps[tuple[jax.Array, jax.Array]]:
        """`combine` in steps."""
        # Copies of a token carry disjoint choices of it, so their sum says which were served.
        served = route.local.choice_sent.astype(jnp.uint8)
        out, served = yield from self._reverse_hops(out, served, route)
        return out, served > 0

    def combine_gradient(
        self, d_out: jax.Array, route: Route, slow_hop_words: jax.Array | None = None
    ) -> Steps[tuple[Any, Any]]:
        """Gradient of MD -> that of SD, and with `slow_hop_words` the tokens' rows again."""
        rows = self.payload.encode(d_out)
        words, fields = message.pack(rows), [Field.of(x) for x in rows]
        last = len(route.plan.hops) - 1
        for number, (hop, hop_permutation) in enumerate(
            zip(route.plan.hops, route.hops, strict=True)
        ):
            sent = hop_permutation.permute(words)
            if slow_hop_words is not None and number == last:
                again = hop_permutation.permute(slow_hop_words)
                sent, fields = jnp.concatenate([sent, again], axis=1), 2 * fields
            words = yield from hop.exchange(sent)
        out = permute_rows(route.local, words, fields)
        return out[: len(rows)], out[len(rows) :]

    def _reverse_hops(
        self, rows: jax.Array, numbers: jax.Array, route: Route
    ) -> Steps[tuple[jax.Array, jax.Array]]:
        """Reverse hops: sums rows SD to MD and per-choice values to MK at each device."""
        row, number = Field.of(rows), Field.of(numbers)
        words = unpermute_rows(route.local, message.pack((rows,)), row)
        for hop, hop_permutation in zip(
            reversed(route.plan.hops), reversed(route.hops), strict=True
        ):
            sent = jnp.concatenate([words, message.pack((numbers,))], axis=1)
            received = yield from hop.exchange(sent)
            words = unpermute_rows(hop_permutation, received, row)
            (numbers,) = message.unpack(received[:, row.words :], [number])
            numbers = hop_permutation.unpermute(numbers)
        return message.unpack(words, [row])[0], numbers


def permute_rows(
    local: Permutation, words: jax.Array, fields: list[Field]
) -> tuple[jax.Array, ...]:
    """The first fields of RW words, permuted to the slots of the local experts: arrays S...."""
    return tuple(message.unpack(local.permute(words[:, : _width(fields)]), fields))


def unpermute_rows(copies: Permutation, words: jax.Array, row: Field) -> jax.Array:
    """SW words that begin with a row -> RW, sums of these rows in float32, rounded once."""
    read = functools.partial(message.numbers, dtype=row.dtype)
    return message.of_numbers(copies.unpermute(words[:, : row.words], read), row.dtype)


def _width(fields: list[Field]) -> int:
    return sum(field.words for field in fields)


NO_EXPERT = 0  # expert e is named e + 1 in a message, and 0 marks an empty slot


def id_dtype(total: int) -> np.dtype:
    """The dtype in which an expert's number travels."""
    return np.dtype(np.uint16 if total < 2**16 - 1 else np.uint32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send(dispatch: AllToAllDispatch, exchange: Exchange) -> Received:
    return _send_forward(dispatch, exchange)[0]


def _send_forward(dispatch: AllToAllDispatch, exchange: Exchange) -> tuple[Received, Route]:
    arrived = run_to_end(dispatch.sending(exchange))
    rows = dispatch.payload.received(arrived.rows, exchange.tokens.dtype)
    return dataclasses.replace(arrived, rows=rows, slow_hop_words=None), arrived.route


def _send_backward(dispatch: AllToAllDispatch, route: Route, d: Received) -> tuple[Exchange]:
    d_tokens, d_weights = run_to_end(dispatch.send_gradient(numbers(d.rows), d.weights, route))
    return (cotangent(route.plan.total, d_tokens, d_weights),)


_send.defvjp(_send_forward, _send_backward)


def _local_ids(expert_names: jax.Array, first: jax.Array, span: int) -> jax.Array:
    """Expert names of a message -> int32 numbers relative to `first`; -1 outside [0, span)."""
    ids = expert_names.astype(jnp.int32) - 1 - first
    return jnp.where((ids >= 0) & (ids < span), ids, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(
    dispatch: AllToAllDispatch, out: jax.Array | TiledArray, route: Route
) -> tuple[jax.Array, jax.Array]:
    return run_to_end(dispatch.combining(numbers(out), route))


def _combine_forward(dispatch: AllToAllDispatch, out: jax.Array | TiledArray, route: Route) -> Any:
    return _combine(dispatch, out, route), (route, jax.tree.map(empty_like, out))


def _combine_backward(dispatch: AllToAllDispatch, saved: Any, cotangents: Any) -> Any:
    route, like = saved
    rows, _ = run_to_end(dispatch.combine_gradient(cotangents[0], route))
    return dispatch.payload.gradient(rows, like), None


_combine.defvjp(_combine_forward, _combine_backward)


# Buffers for any router at all, for a model that is not trained here.
EXACT = AllToAllDispatch(
    separate_gpu_hop=False, capacity_factor=math.inf, most_nodes=1, payload=UNCHANGED_PAYLOAD
)


def of(config: Config, recipe: Recipe = FLOAT32) -> Dispatch:
    """The dispatch of `layout.dispatch`, with the payload of `precision.dispatch`.

    Args:
      recipe: by whose kernels a payload in FP8 is encoded.
    """
    payload = recipe.payload(config.precision.dispatch == "fp8")
    if config.layout.dispatch == "reference":
        return ReferenceDispatch(payload)
    two = config.layout.dispatch == "two_hop"
    return AllToAllDispatch(two, config.layout.capacity_factor, most_nodes(config.model), payload)
