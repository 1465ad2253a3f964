"""Tokens to their experts and back: one interface, interchangeable parts.

A dispatch takes the work of the experts that live on this device as a function of rows sorted by
expert, brings every (token, chosen expert) there, and returns to each token the sum of what its
experts made of it. No token is ever dropped.

M tokens of this device, K chosen experts per token, E experts in all, D model width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel import axes

# (rows RD sorted by expert, routing weights R, rows per local expert, how many of R are likely
# used) -> RD, weighted
RunExperts = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]


class Dispatch(Protocol):
    def __call__(
        self, run: RunExperts, tokens: jax.Array, experts: jax.Array, weights: jax.Array, total: int
    ) -> jax.Array:
        """tokens MD, experts MK int32, weights MK float32, total E -> MD."""
        ...


def reference(
    run: RunExperts, tokens: jax.Array, experts: jax.Array, weights: jax.Array, total: int
) -> jax.Array:
    """Every expert sees every token, weight 0 where not chosen: the truth, E/K times slower."""
    count = tokens.shape[0]
    if axes.size("experts") > 1:
        raise ConfigError("layout.dispatch=reference needs all experts on every device; use flat")
    spread = jnp.sum(jax.nn.one_hot(experts, total) * weights[..., None], axis=1)  # ME
    rows = jnp.tile(tokens, (total, 1))  # (EM)D
    sizes = jnp.full((total,), count, jnp.int32)
    out = run(rows, spread.T.reshape(-1), sizes, total * count)
    return out.reshape(total, count, -1).sum(0)


def flat(
    run: RunExperts, tokens: jax.Array, experts: jax.Array, weights: jax.Array, total: int
) -> jax.Array:
    """One all-to-all over the whole expert group, a copy per (token, expert), and one back.

    A slot exists for every copy that could go to one device, so nothing overflows: M * min(K, local
    experts) slots per destination.
    """
    count, top_k = experts.shape
    parts = axes.size("experts")
    order = sort_by(experts.reshape(-1), total)
    copies = take_copies(tokens, order, top_k)
    copy_weights = permute(weights.reshape(-1), order)
    if parts == 1:
        out = run(copies, copy_weights, order.sizes, count * top_k)
        return permute(out, order.inverse()).reshape(count, top_k, -1).sum(1)

    here = total // parts
    slots = count * min(top_k, here)
    sent = order.sizes.reshape(parts, here)  # rows for each expert of each destination
    lanes = Lanes.of(sent.sum(1), slots, copies.shape[0])
    arrived_sizes = _exchange(sent)  # rows from each source for each local expert
    rows = _exchange(lanes.fill(copies)).reshape(parts * slots, -1)
    row_weights = _exchange(lanes.fill(copy_weights)).reshape(-1)

    by_expert = sort_by(_expert_of_slot(arrived_sizes, slots), here + 1)
    rows, row_weights = permute(rows, by_expert), permute(row_weights, by_expert)
    out = run(rows, row_weights, by_expert.sizes[:here], count * top_k)
    returned = _exchange(permute(out, by_expert.inverse()).reshape(parts, slots, -1))
    return permute(lanes.empty(returned), order.inverse()).reshape(count, top_k, -1).sum(1)


FLAT: Dispatch = flat
_BY_NAME: dict[str, Dispatch] = {"flat": flat, "reference": reference}


def by_name(name: str) -> Dispatch:
    if name not in _BY_NAME:
        raise ConfigError(f"layout.dispatch is {name!r}; known: {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Order:
    """A permutation with its inverse, so that moving rows back is a gather too, never a scatter.

    Attributes:
      index: new position -> old position.
      back: old position -> new position.
      sizes: rows of each key; empty for an inverse.
    """

    index: jax.Array
    back: jax.Array
    sizes: jax.Array

    def inverse(self) -> "Order":
        return Order(self.back, self.index, self.sizes)


def sort_by(keys: jax.Array, total: int) -> Order:
    """The stable order of integer keys in [0, total)."""
    index = jnp.argsort(keys, stable=True)
    place = jnp.arange(keys.shape[0], dtype=index.dtype)
    back = jnp.zeros_like(index).at[index].set(place, unique_indices=True)
    sizes = jnp.zeros((total,), jnp.int32).at[keys].add(1)
    return Order(index, back, sizes)


def permute(x: jax.Array, order: Order) -> jax.Array:
    """x[order.index]; the gradient goes back through the inverse."""
    return _permute(x, order.index, order.back)


@jax.custom_vjp
def _permute(x, index, back):
    return _rows(x, index)


_permute.defvjp(
    lambda x, index, back: (_rows(x, index), back), lambda back, dy: (_rows(dy, back), None, None)
)


def take_copies(tokens: jax.Array, order: Order, copies: int) -> jax.Array:
    """Row r is the token of copy order.index[r]; token m has copies m*copies, m*copies+1, ..."""
    return _take_copies(tokens, order.index, order.back, copies)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _take_copies(tokens, index, back, copies):
    return _rows(tokens, index // copies)


def _take_copies_back(copies, back, dy):
    ordered = _rows(dy, back)
    return ordered.reshape(-1, copies, *dy.shape[1:]).sum(1), None, None


_take_copies.defvjp(
    lambda tokens, index, back, copies: (_take_copies(tokens, index, back, copies), back),
    _take_copies_back,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lanes:
    """Rows sorted by destination <-> equal lanes of slots, one per destination.

    Attributes:
      row: (lanes, slots) which row a slot holds.
      used: (lanes, slots) bool, whether it holds one.
      slot: per row, its place in the flattened lanes.
    """

    row: jax.Array
    used: jax.Array
    slot: jax.Array

    @staticmethod
    def of(sizes: jax.Array, slots: int, rows: int) -> "Lanes":
        """sizes: rows of each destination, none above `slots`."""
        ends = jnp.cumsum(sizes)
        starts = ends - sizes
        slot = jnp.arange(slots, dtype=sizes.dtype)[None]
        used = slot < sizes[:, None]
        row = jnp.where(used, starts[:, None] + slot, 0)
        r = jnp.arange(rows, dtype=sizes.dtype)
        lane = jnp.searchsorted(ends, r, side="right").astype(sizes.dtype)
        return Lanes(row, used, lane * slots + r - starts[lane])

    def fill(self, x: jax.Array) -> jax.Array:
        """Rows -> (lanes, slots, ...), zero where unused."""
        return _fill(x, self.row, self.used, self.slot)

    def empty(self, x: jax.Array) -> jax.Array:
        """(lanes, slots, ...) -> rows."""
        return _empty(x, self.row, self.used, self.slot)


@jax.custom_vjp
def _fill(x, row, used, slot):
    mask = used.reshape(used.shape + (1,) * (x.ndim - 1))
    return jnp.where(mask, _rows(x, row), jnp.zeros((), x.dtype))


@jax.custom_vjp
def _empty(x, row, used, slot):
    return _rows(x.reshape(-1, *x.shape[2:]), slot)


_fill.defvjp(
    lambda x, row, used, slot: (_fill(x, row, used, slot), (row, used, slot)),
    lambda saved, dy: (_empty(dy, *saved), None, None, None),
)
_empty.defvjp(
    lambda x, row, used, slot: (_empty(x, row, used, slot), (row, used, slot)),
    lambda saved, dy: (_fill(dy, *saved), None, None, None),
)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")


def _exchange(x: jax.Array) -> jax.Array:
    """Lane i goes to device i of the expert group; lane i of the result came from device i."""
    return lax.all_to_all(x, axes.names("experts"), 0, 0, tiled=True)


def _expert_of_slot(sizes: jax.Array, slots: int) -> jax.Array:
    """Local expert of each arrived slot, lanes flattened; `here` for an empty one.

    sizes: (parts, here) rows from each source for each local expert, in that order within a lane.
    """
    ends = jnp.cumsum(sizes, axis=1)
    slot = jnp.arange(slots, dtype=sizes.dtype)
    return (slot[None, :, None] >= ends[:, None, :]).sum(-1).reshape(-1)
