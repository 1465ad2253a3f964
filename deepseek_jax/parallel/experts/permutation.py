"""Rows <-> the slots that hold their copies: the one way in which dispatch moves tokens.

R rows, K choices of each, P places a choice may name, S slots, J = min(K, P) copies at most.

Going out, a slot takes the row whose copy it holds; going home, a row sums the slots of its copies.
Each is the transpose of the other and both are gathers, so no gradient ever scatters.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Permutation:
    """Attributes:
    choice: S int32, which of the R * K choices a slot was made for; 0 where it is empty.
    used: S bool, whether the slot holds a copy.
    slot, sent: RJ, the slots of a row's copies, and whether there is such a copy.
    choice_slot, choice_sent: RK, the slot that serves a choice (choices of one place share a copy),
      and whether one does: a copy that found no slot is not sent.
    """

    choice: jax.Array
    used: jax.Array
    slot: jax.Array
    sent: jax.Array
    choice_slot: jax.Array
    choice_sent: jax.Array

    def permute(self, x: jax.Array) -> jax.Array:
        """R... -> S..., zero in empty slots."""
        return _where(self.used, _take(x, self.choice // self.choice_slot.shape[1]))

    def unpermute(self, x: jax.Array, read: Callable[[jax.Array], Any] | None = None) -> Any:
        """S... -> R..., the sum over a row's copies; float32 for floats of fewer bits.

        Args:
          read: what to sum of the copies' bits, an array or several, instead of the copies.
        """
        copies = range(self.slot.shape[1])
        bits = [_where(self.sent[:, j], _take(x, self.slot[:, j])) for j in copies]
        return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *map(read or _wide, bits))

    def permute_choices(self, x: jax.Array) -> jax.Array:
        """RK, a number of each choice -> S, zero in empty slots."""
        return _where(self.used, _take(x.reshape(-1), self.choice))

    def unpermute_choices(self, x: jax.Array) -> jax.Array:
        """S -> RK, the number of the slot that serves each choice; zero where none does."""
        return _where(self.choice_sent, _take(x, self.choice_slot))


def lanes(places: jax.Array, parts: int, slots: int) -> Permutation:
    """One copy per (row, place), in equal lanes of slots, one lane for each of `parts` places.

    Args:
      places: RK int32; anything outside [0, parts) is nowhere.
      slots: of one lane; what exceeds them is not sent. The Fan has parts * slots in all.
    """
    member, rank, sizes = _ranks(places, parts)
    lane = jnp.arange(parts, dtype=jnp.int32)
    used = jnp.arange(slots, dtype=jnp.int32)[None] < sizes[:, None]
    slot = (lane * slots)[None] + rank
    return _permutation(places, member & (rank < slots), slot, used.reshape(-1))


def sorted_by_expert(places: jax.Array, parts: int, slots: int) -> tuple[Permutation, jax.Array]:
    """One copy per (row, place), all of place 0 first; and the slots that each place got, P int32.

    Args:
      places: RK int32; anything outside [0, parts) is nowhere.
      slots: in all; what exceeds them is not sent.
    """
    member, rank, sizes = _ranks(places, parts)
    ends = jnp.cumsum(sizes)
    slot = (ends - sizes)[None] + rank
    used = jnp.arange(slots, dtype=jnp.int32) < ends[-1]
    got = jnp.minimum(ends, slots) - jnp.minimum(ends - sizes, slots)
    return _permutation(places, member & (slot < slots), slot, used), got


def _ranks(places: jax.Array, parts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which rows go to a place RP, how many rows before each one do RP, and how many in all P."""
    member = (places[:, :, None] == jnp.arange(parts, dtype=places.dtype)[None, None]).any(1)
    through = _running_count(member)
    return member, through - member.astype(jnp.int32), through[-1]


_BLOCK = 128


def _running_count(member: jax.Array) -> jax.Array:
    """How many of the rows up to each one are members, RP bool -> RP int32.

    Two small products with a triangle of ones, exact in float32 (in TF32, too: no factor is above
    128). A cumulative sum is the same but takes XLA many kernels, each of them long to compile.
    """
    rows, parts = member.shape
    blocks = -(-rows // _BLOCK)
    ones = jnp.pad(member.astype(jnp.float32), ((0, blocks * _BLOCK - rows), (0, 0)))
    ones = ones.reshape(blocks, _BLOCK, parts)
    before = jnp.tri(blocks, k=-1) @ ones.sum(1)  # of whole blocks
    within = jnp.einsum("ij,bjp->bip", jnp.tri(_BLOCK), ones)
    through = (within + before[:, None]).reshape(-1, parts)[:rows]
    return through.astype(jnp.int32)


def _permutation(
    places: jax.Array, sent: jax.Array, slot: jax.Array, used: jax.Array
) -> Permutation:
    """From what is known of each (row, place): whether its copy is sent RP, and to which slot."""
    (rows, choices), (parts, slots) = places.shape, (sent.shape[1], used.shape[0])
    somewhere = (places >= 0) & (places < parts)
    place = jnp.where(somewhere, places, 0)
    choice_sent = somewhere & jnp.take_along_axis(sent, place, 1)
    choice_slot = jnp.where(choice_sent, jnp.take_along_axis(slot, place, 1), 0)
    number = jnp.arange(rows * choices, dtype=jnp.int32)
    target = jnp.where(choice_sent, choice_slot, slots).reshape(-1)
    # Choices that share a copy write the same slot; whichever stays, it names the right row.
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
