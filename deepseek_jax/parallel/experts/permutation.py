"""Permute and unpermute: rows (tokens) to buffer slots that hold their copies, and back.

R rows, K choices of each, P destinations (experts, GPUs or nodes) that a choice may name, S slots,
J = min(K, P) copies of a row at most.

In `permute` a slot gathers the row whose copy it holds; in `unpermute` a row gathers the slots of
its copies and sums them. Each is the transpose of the other, so no gradient is ever a scatter.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Permutation:
    """Assignment of copies of rows to slots.

    Attributes:
      choice: S int32, the one of the R * K choices that the slot serves; 0 in an empty slot.
      used: S bool, whether the slot holds a copy.
      slot, sent: RJ int32 and bool, slots of a row's copies, and whether each copy exists.
      choice_slot, choice_sent: RK int32 and bool, slot that serves a choice, and whether one does.
        Choices of one destination share a copy; a copy beyond the capacity has no slot.
    """

    choice: jax.Array
    used: jax.Array
    slot: jax.Array
    sent: jax.Array
    choice_slot: jax.Array
    choice_sent: jax.Array

    def permute(self, x: jax.Array) -> jax.Array:
        """Rows R... -> slots S..., zeros in empty slots."""
        return _where(self.used, _take(x, self.choice // self.choice_slot.shape[1]))

    def unpermute(self, x: jax.Array, read: Callable[[jax.Array], Any] | None = None) -> Any:
        """Slots S... -> rows R..., the sum of each row's copies, at least float32 for floats.

        Args:
          read: maps the bits of the copies to the array, or tree of arrays, to be summed.
        """
        copies = range(self.slot.shape[1])
        bits = [_where(self.sent[:, j], _take(x, self.slot[:, j])) for j in copies]
        return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *map(read or _wide, bits))

    def permute_choices(self, x: jax.Array) -> jax.Array:
        """Values of the choices, RK -> values of the slots, S; zero in empty slots."""
        return _where(self.used, _take(x.reshape(-1), self.choice))

    def unpermute_choices(self, x: jax.Array) -> jax.Array:
        """Values of the slots, S -> values of the choices, RK; zero where no slot serves one."""
        return _where(self.choice_sent, _take(x, self.choice_slot))


def lanes(places: jax.Array, parts: int, slots: int) -> Permutation:
    """Permutation with a copy per (row, destination), in an equal lane of slots per destination.

    Args:
      places: RK int32 destinations; a choice outside [0, parts) is not sent.
      parts: P.
      slots: slots per lane, its capacity; copies beyond it are not sent. S is parts * slots.
    """
    _check(places)
    member, rank, sizes = _ranks(places, parts)
    lane = jnp.arange(parts, dtype=jnp.int32)
    used = jnp.arange(slots, dtype=jnp.int32)[None] < sizes[:, None]
    slot = (lane * slots)[None] + rank
    return _permutation(places, member & (rank < slots), slot, used.reshape(-1))


def sorted_by_expert(places: jax.Array, parts: int, slots: int) -> tuple[Permutation, jax.Array]:
    """Permutation with a copy per (row, destination), sorted by destination; and counts P int32.

    Args:
      places: RK int32 destinations; a choice outside [0, parts) is not sent.
      parts: P.
      slots: S, for all destinations together; copies beyond them are not sent.
    """
    _check(places)
    member, rank, sizes = _ranks(places, parts)
    ends = jnp.cumsum(sizes)
    slot = (ends - sizes)[None] + rank
    used = jnp.arange(slots, dtype=jnp.int32) < ends[-1]
    counts = jnp.minimum(ends, slots) - jnp.minimum(ends - sizes, slots)
    return _permutation(places, member & (slot < slots), slot, used), counts


def _check(places: jax.Array) -> None:
    chex.assert_rank(places, 2, custom_message="places: RK int32")
    chex.assert_type(places, jnp.int32)


def _ranks(places: jax.Array, parts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows of each destination RP bool, their ranks among those RP, and their numbers P, int32."""
    member = (places[:, :, None] == jnp.arange(parts, dtype=places.dtype)[None, None]).any(1)
    through = _running_count(member)
    return member, through - member.astype(jnp.int32), through[-1]


_BLOCK = 128


def _running_count(member: jax.Array) -> jax.Array:
    """Cumulative sum over rows, RP bool -> RP int32.

    Two small matmuls with triangles of ones, exact in float32 (and in TF32, as no factor exceeds
    128). XLA makes many kernels of `jnp.cumsum`, each slow to compile.
    """
    rows, parts = member.shape
    blocks = -(-rows // _BLOCK)
    ones = jnp.pad(member.astype(jnp.float32), ((0, blocks * _BLOCK - rows), (0, 0)))
    ones = ones.reshape(blocks, _BLOCK, parts)
    before = jnp.tri(blocks, k=-1) @ ones.sum(1)  # counts of earlier blocks
    within = jnp.einsum("ij,bjp->bip", jnp.tri(_BLOCK), ones)
    through = (within + before[:, None]).reshape(-1, parts)[:rows]
    return through.astype(jnp.int32)


def _permutation(
    places: jax.Array, sent: jax.Array, slot: jax.Array, used: jax.Array
) -> Permutation:
    """Permutation from `sent` RP and `slot` RP of the copy of each (row, destination)."""
    (rows, choices), (parts, slots) = places.shape, (sent.shape[1], used.shape[0])
    valid = (places >= 0) & (places < parts)
    place = jnp.where(valid, places, 0)
    choice_sent = valid & jnp.take_along_axis(sent, place, 1)
    choice_slot = jnp.where(choice_sent, jnp.take_along_axis(slot, place, 1), 0)
    number = jnp.arange(rows * choices, dtype=jnp.int32)
    target = jnp.where(choice_sent, choice_slot, slots).reshape(-1)
    # Choices that share a copy write the same slot; all of them name the same row.
    choice = jnp.zeros((slots,), jnp.int32).at[target].set(number, mode="drop")
    if parts <= choices:
        return Permutation(choice, used, jnp.where(sent, slot, 0), sent, choice_slot, choice_sent)
    earlier = jnp.tril(places[:, :, None] == places[:, None, :], -1).any(-1)
    return Permutation(choice, used, choice_slot, choice_sent & ~earlier, choice_slot, choice_sent)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)


def _where(mask: jax.Array, x: jax.Array) -> jax.Array:
    mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return jnp.where(mask, x, jnp.zeros((), x.dtype))
