"""Tokens to their experts and back, shaped like the network (section 3.2.2).

A dispatch has two steps with the experts between them, so that other work can be put under each:

  send     every (token, chosen expert) reaches the device of its expert;
  combine  what the experts made of a token comes home, summed wherever its copies meet.

`two_hop` crosses to each chosen node once, on the GPU of its own index, and fans out inside the
node; the way back sums on each GPU, then on each node, then at home. `flat` goes to each chosen GPU
directly. The two differ in their hops alone: a hop is one all-to-all, with one message for all that
travels. `reference` has every expert see every token.

Buffers hold a multiple of the mean load and no more. What does not fit is not dropped: it stays
with its token, and `overflow.py` sends it in further rounds of the same exchange.

M tokens of this device, K chosen experts of each, E experts in all, D model width, S slots for the
copies that this device's experts work on.
"""

import dataclasses
import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import Config, ConfigError, buffer_slots, most_nodes
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.experts import message, permutation
from deepseek_jax.parallel.experts.message import WORD_BYTES, Field
from deepseek_jax.parallel.experts.permutation import Permutation
from deepseek_jax.parallel.overlap import Steps, run_to_end
from deepseek_jax.precision.payload import FP8_PAYLOAD, UNCHANGED_PAYLOAD, Payload
from deepseek_jax.precision.saved import Saved, save


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Received:
    """What reached this device's experts.

    Attributes:
      rows: SD in the recipe's dtype, sorted by expert; zero past the last.
      weights: S float32, routing weights.
      sizes: int32, rows of each local expert.
      route: what `combine` needs to bring their results home.
      likely: how many of the S rows a balanced router fills.
      passed: words of what came over the slow hop, of which the fast one makes `rows`, which are
        twice as many; None where there are not two hops.
    """

    rows: Any
    weights: jax.Array
    sizes: jax.Array
    route: Any
    likely: int = dataclasses.field(metadata=dict(static=True))
    passed: jax.Array | None = None


class Dispatch(Protocol):
    def send(
        self, tokens: jax.Array, weights: jax.Array, experts: jax.Array, left: jax.Array, total: int
    ) -> Received:
        """Tokens to their experts.

        Args:
          tokens: MD.
          weights: MK float32.
          experts: MK int32 in [0, total), distinct for each token.
          left: MK bool, which choices to send.
          total: E.
        """
        ...

    def combine(self, out: jax.Array, route: Any) -> tuple[jax.Array, jax.Array]:
        """out SD -> MD, the sum over each token's copies; and MK bool, which choices it holds."""
        ...

    def complete(self, tokens: int, top_k: int, total: int) -> bool:
        """Whether the buffers hold whatever a router may choose, so that one round serves all."""
        ...


@dataclasses.dataclass(frozen=True)
class ReferenceDispatch:
    """Every expert sees every token, weight 0 where not chosen: the truth, E/K times slower."""

    payload: Payload

    def send(self, tokens, weights, experts, left, total):
        if axes.size("experts") > 1:
            raise ConfigError(
                "layout.dispatch=reference needs all experts on every device; set it to flat"
            )
        count = tokens.shape[0]
        spread = jax.nn.one_hot(experts, total) * jnp.where(left, weights, 0.0)[..., None]  # MKE
        rows = jnp.tile(_travel(tokens, self.payload), (total, 1))  # (EM)D
        sizes = jnp.full((total,), count, jnp.int32)
        return Received(rows, spread.sum(1).T.reshape(-1), sizes, left, total * count)

    def combine(self, out, route):
        total = out.shape[0] // route.shape[0]
        return _return(out, self.payload).reshape(total, route.shape[0], -1).sum(0), route

    def complete(self, tokens, top_k, total):
        return True


@dataclasses.dataclass(frozen=True)
class Hop:
    """One all-to-all.

    Attributes:
      over: mesh axes.
      parts: devices along them.
      slots: of each lane, the part of the buffer that one device gets.
    """

    over: tuple[str, ...]
    parts: int
    slots: int

    def exchange(self, words: jax.Array) -> Steps[jax.Array]:
        """(parts * slots)W: lane i goes to device i; lane i now came from there.

        One step, which ends when the message is there.
        """
        lanes = words.reshape(self.parts, self.slots, -1)
        arrived = yield lax.all_to_all(lanes, self.over, 0, 0, tiled=True)
        return arrived.reshape(words.shape)


@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """Sizes of one exchange, known before it is compiled.

    Attributes:
      hops: outermost first; none where all experts are here.
      total: experts in all.
      slots: S.
      likely: how many of them a balanced router fills.
    """

    hops: tuple[Hop, ...]
    total: int
    slots: int
    likely: int

    @property
    def here(self) -> int:
        """Experts of one device."""
        return self.total // math.prod(hop.parts for hop in self.hops)

    def message_bytes(
        self, payload: Payload, width: int, dtype: Any, top_k: int
    ) -> dict[str, list[int]]:
        """Bytes of each hop's all-to-all on one device, outermost first: those of the two steps
        and of their gradients, for rows of `width` numbers of `dtype`."""

        def words(*fields: int) -> list[int]:
            per_slot = WORD_BYTES * sum(-(-size // WORD_BYTES) for size in fields)
            return [hop.parts * hop.slots * per_slot for hop in self.hops]

        out, home = payload.bytes_out(width, dtype), width * jnp.dtype(dtype).itemsize
        weights, ids, served = 4 * top_k, _id_dtype(self.total).itemsize * top_k, top_k
        return {
            "send": words(*out, weights, ids),
            "combine": words(home, served),
            "combine gradient": words(*out),
            "send gradient": words(home, weights),
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Route:
    """Which slot each copy took: on every hop, and before the local experts."""

    hops: tuple[Permutation, ...]
    local: Permutation
    plan: ExchangePlan = dataclasses.field(metadata=dict(static=True))


@dataclasses.dataclass(frozen=True)
class AllToAllDispatch:
    """The dispatch that sends one copy per (token, destination) on each hop.

    Attributes:
      gpu_apart: whether the `gpu` axis is a hop of its own, after all others.
      buffer: slots, as a multiple of what a balanced router fills.
      most_nodes: how many destinations the first of two hops has for one token.
      payload: what tokens travel as.
    """

    gpu_apart: bool
    capacity_factor: float
    most_nodes: int
    payload: Payload

    def hop_axes(self) -> list[tuple[str, ...]]:
        """The mesh axes of each hop, outermost first."""
        over = axes.names("experts")
        fast = tuple(name for name in over if self.gpu_apart and name == "gpu")
        return [group for group in (tuple(n for n in over if n not in fast), fast) if group]

    def plan(self, tokens: int, top_k: int, total: int) -> ExchangePlan:
        groups = self.hop_axes()
        parts = tuple(axes.devices(group) for group in groups)
        *lanes, slots = buffer_slots(
            self.capacity_factor, tokens, top_k, total, parts, self.most_nodes
        )
        hops = tuple(Hop(*hop) for hop in zip(groups, parts, lanes, strict=True))
        return ExchangePlan(hops, total, slots, min(slots, tokens * top_k))

    def complete(self, tokens, top_k, total):
        plan, rows = self.plan(tokens, top_k, total), tokens
        for hop in plan.hops:
            if hop.slots < rows:
                return False
            rows = hop.parts * hop.slots
        return plan.slots >= rows * min(top_k, plan.here)

    def send(self, tokens, weights, experts, left, total):
        return _send(self, tokens, weights, experts, left, total)

    def combine(self, out, route):
        return _combine(self, out, route)

    # The same with a step for each hop, and their gradients. In these, what arrives is as it
    # travels: `payload.decode` makes rows of it.

    def sending(
        self, tokens: jax.Array, weights: jax.Array, experts: jax.Array, left: jax.Array, total: int
    ) -> Steps[Received]:
        count, top_k = experts.shape
        plan = self.plan(count, top_k, total)
        named = jnp.where(left, experts + 1, NOBODY).astype(_id_dtype(total))
        sent: Any = (*self.payload.encode(tokens), weights, named)
        fields, words = [Field.of(x) for x in sent], message.pack(sent)
        first, span, passed = jnp.int32(0), total, None
        permutations: list[Permutation] = []
        for hop in plan.hops:
            if permutations:
                passed = words[:, : _width(fields[:-2])]
            ids = _among(message.unpack(words, fields)[-1], first, span)
            span //= hop.parts
            hop_permutation = permutation.lanes(
                jnp.where(ids < 0, hop.parts, ids // span), hop.parts, hop.slots
            )
            words = yield from hop.exchange(hop_permutation.permute(words))
            first += lax.axis_index(hop.over) * span
            permutations.append(hop_permutation)
        *_, weights, named = message.unpack(words, fields)
        local, sizes = permutation.sorted_by_expert(
            _among(named, first, span), plan.here, plan.slots
        )
        route = save(Saved.ROUTE, Route(tuple(permutations), local, plan))
        rows, weights = permute_rows(local, words, fields[:-2]), local.permute_choices(weights)
        rows, weights = save(Saved.ARRIVED, (rows, weights))
        return Received(rows, weights, save(Saved.ROUTE, sizes), route, plan.likely, passed)

    def send_gradient(
        self, d_rows: jax.Array, d_weights: jax.Array, route: Route
    ) -> Steps[tuple[jax.Array, jax.Array]]:
        """Gradients of SD and S -> those of MD and MK."""
        return (yield from self._homeward(d_rows, route.local.unpermute_choices(d_weights), route))

    def combining(self, out: jax.Array, route: Route) -> Steps[tuple[jax.Array, jax.Array]]:
        # Each copy carries other choices of its token, so a sum says which were served at all.
        served = route.local.choice_sent.astype(jnp.uint8)
        home, served = yield from self._homeward(out, served, route)
        return home, served > 0

    def combine_gradient(
        self, d_out: jax.Array, route: Route, passed: jax.Array | None = None
    ) -> Steps[tuple[Any, Any]]:
        """Gradient of MD -> that of SD.

        Args:
          passed: of what arrived when the tokens were sent. With the gradient's last message the
            tokens' rows come again, and need not be kept; None where they are.

        Returns:
          Both as they travel; of the rows nothing, if nothing passed.
        """
        rows = self.payload.encode(d_out)
        words, fields = message.pack(rows), [Field.of(x) for x in rows]
        last = len(route.plan.hops) - 1
        for number, (hop, hop_permutation) in enumerate(
            zip(route.plan.hops, route.hops, strict=True)
        ):
            mail = hop_permutation.permute(words)
            if passed is not None and number == last:
                mail, fields = (
                    jnp.concatenate([mail, hop_permutation.permute(passed)], axis=1),
                    2 * fields,
                )
            words = yield from hop.exchange(mail)
        out = permute_rows(route.local, words, fields)
        return out[: len(rows)], out[len(rows) :]

    def _homeward(self, rows, numbers, route) -> Steps[tuple[jax.Array, jax.Array]]:
        """Rows SD -> MD and a number of each choice -> MK, summed wherever copies meet."""
        row, number = Field.of(rows), Field.of(numbers)
        words = unpermute_rows(route.local, message.pack((rows,)), row)
        for hop, hop_permutation in zip(
            reversed(route.plan.hops), reversed(route.hops), strict=True
        ):
            mail = jnp.concatenate([words, message.pack((numbers,))], axis=1)
            mail = yield from hop.exchange(mail)
            words = unpermute_rows(hop_permutation, mail, row)
            (numbers,) = message.unpack(mail[:, row.words :], [number])
            numbers = hop_permutation.unpermute(numbers)
        return message.unpack(words, [row])[0], numbers


def permute_rows(
    local: Permutation, words: jax.Array, fields: list[Field]
) -> tuple[jax.Array, ...]:
    """The first fields of RW words, in the slots of a device's own experts: arrays S...."""
    return tuple(message.unpack(local.permute(words[:, : _width(fields)]), fields))


def unpermute_rows(copies: Permutation, words: jax.Array, row: Field) -> jax.Array:
    """SW words that begin with a row -> the words RW of their sums in float32, rounded once."""
    read = functools.partial(message.numbers, dtype=row.dtype)
    return message.of_numbers(copies.unpermute(words[:, : row.words], read), row.dtype)


def _width(fields: list[Field]) -> int:
    return sum(field.words for field in fields)


NOBODY = 0  # on a hop, expert e is called e + 1, so that an empty slot asks for nobody


def _id_dtype(total: int) -> np.dtype:
    return np.dtype(np.uint16 if total < 2**16 - 1 else np.uint32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def _send(hops, tokens, weights, experts, left, total):
    return _send_forward(hops, tokens, weights, experts, left, total)[0]


def _send_forward(hops, tokens, weights, experts, left, total):
    arrived = run_to_end(hops.sending(tokens, weights, experts, left, total))
    rows = hops.payload.decode(arrived.rows, tokens.dtype)
    return dataclasses.replace(arrived, rows=rows, passed=None), arrived.route


def _send_backward(hops, total, route, cotangent):
    gradients = run_to_end(hops.send_gradient(cotangent.rows, cotangent.weights, route))
    return *gradients, None, None


_send.defvjp(_send_forward, _send_backward)


def _among(named: jax.Array, first: jax.Array, span: int) -> jax.Array:
    """Names -> int32 ids counted from expert `first`; -1 for nobody, and from `span` on."""
    ids = named.astype(jnp.int32) - 1 - first
    return jnp.where((ids >= 0) & (ids < span), ids, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(hops, out, route):
    return run_to_end(hops.combining(out, route))


def _combine_forward(hops, out, route):
    return _combine(hops, out, route), (route, jnp.zeros((0,), out.dtype))


def _combine_backward(hops, saved, cotangents):
    route, like = saved
    rows, _ = run_to_end(hops.combine_gradient(cotangents[0], route))
    return hops.payload.decode(rows, like.dtype), None


_combine.defvjp(_combine_forward, _combine_backward)


# What the payload does to numbers, where nothing travels.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _travel(tokens: jax.Array, payload: Payload) -> jax.Array:
    return payload.decode(payload.encode(tokens), tokens.dtype)


_travel.defvjp(lambda tokens, payload: (_travel(tokens, payload), None), lambda *a: (a[-1],))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _return(out: jax.Array, payload: Payload) -> jax.Array:
    return out


_return.defvjp(
    lambda out, payload: (out, None),
    lambda payload, _, dy: (payload.decode(payload.encode(dy), dy.dtype),),
)


# Buffers for any router at all: what a model that is not trained here runs with.
EXACT = AllToAllDispatch(
    gpu_apart=False, capacity_factor=math.inf, most_nodes=1, payload=UNCHANGED_PAYLOAD
)


def unbounded(dispatch: Dispatch) -> Dispatch:
    """The same with buffers for any router at all: for few tokens, that is little."""
    return (
        dataclasses.replace(dispatch, capacity_factor=math.inf)
        if isinstance(dispatch, AllToAllDispatch)
        else dispatch
    )


def of(config: Config) -> Dispatch:
    """The dispatch of `layout.dispatch`, with the payload of `precision.dispatch`."""
    payload = FP8_PAYLOAD if config.precision.dispatch == "fp8" else UNCHANGED_PAYLOAD
    if config.layout.dispatch == "reference":
        return ReferenceDispatch(payload)
    two = config.layout.dispatch == "two_hop"
    return AllToAllDispatch(two, config.layout.capacity_factor, most_nodes(config.model), payload)
