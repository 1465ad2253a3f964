"""State that a loop over ticks carries: pools of slots, sums, and conditional updates of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.overlap import Steps, run_to_end


def zeros(tree: Any) -> Any:
    """Zeros with the shapes and dtypes of a tree's leaves."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def pool(like: Any, slots: int) -> jax.Array:
    """Pool of `slots` arrays with the shape and dtype of `like`."""
    return jnp.zeros((slots, *like.shape), like.dtype)


def read(pool: jax.Array, slot: jax.Array) -> jax.Array:
    """Array in slot `slot`, a traced index."""
    return lax.dynamic_index_in_dim(pool, slot, 0, keepdims=False)


def write(pool: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
    """The pool with `value` in slot `slot`."""
    return lax.dynamic_update_index_in_dim(pool, value, slot, 0)


@dataclasses.dataclass(frozen=True)
class SharedPools:
    """Pools for several kinds of trees; leaves of equal shape and dtype in two kinds share a pool.

    Attributes:
      likes: shape and dtype of the arrays of each pool.
      pool_of: [kind][leaf] -> number of the leaf's pool.
      trees: tree structure of each kind.
    """

    likes: list[Any]
    pool_of: list[list[int]]
    trees: list[Any]

    @classmethod
    def of(cls, kinds: Sequence[Any]) -> "SharedPools":
        """Pools for trees like `kinds`, whose leaves have a shape and a dtype."""
        likes: list[Any] = []
        pool_of: list[list[int]] = []
        for kind in kinds:
            taken: list[int] = []
            for leaf in jax.tree.leaves(kind):
                alike = (
                    i
                    for i, like in enumerate(likes)
                    if i not in taken and (like.shape, like.dtype) == (leaf.shape, leaf.dtype)
                )
                taken.append(next(alike, len(likes)))
                if taken[-1] == len(likes):
                    likes.append(leaf)
            pool_of.append(taken)
        return cls(likes, pool_of, [jax.tree.structure(kind) for kind in kinds])

    def pools(self, slots: int) -> list[jax.Array]:
        """New pools of `slots` slots each."""
        return [pool(like, slots) for like in self.likes]

    def read(self, pools: list[jax.Array], kind: int, slot: jax.Array) -> Any:
        """Tree of the given kind in slot `slot`."""
        leaves = [read(pools[number], slot) for number in self.pool_of[kind]]
        return jax.tree.unflatten(self.trees[kind], leaves)

    def write(
        self, pools: list[jax.Array], kind: int, slot: jax.Array, tree: Any
    ) -> list[jax.Array]:
        """The pools with `tree` in slot `slot`; pools that its kind does not use are unchanged."""
        new = dict(zip(self.pool_of[kind], jax.tree.leaves(tree), strict=True))
        return [write(p, slot, new[i]) if i in new else p for i, p in enumerate(pools)]


def accumulated(totals: list[Any], chunk: int, more: Any, on: jax.Array) -> list[Any]:
    """`totals` with `more` added to the chunk's; where `on` is false `more` counts as zeros."""
    sums = jax.tree.map(lambda old, new: old + jnp.where(on, new, 0), totals[chunk], more)
    return [sums if c == chunk else total for c, total in enumerate(totals)]


def run_work_if(on: jax.Array, work: Steps[Any], like: Any) -> Any:
    """A work's result if `on`, else zeros like it.

    The branches meet as leaves: static structure of a result, as residuals have, differs from one
    trace to the next.
    """
    leaves, structure = jax.tree.flatten(like)
    done = lax.cond(on, lambda: jax.tree.leaves(run_to_end(work)), lambda: zeros(leaves))
    return jax.tree.unflatten(structure, done)


def run_if(on: jax.Array, fn: Callable[[Any], Any], value: Any) -> Any:
    """fn(value) if `on`, else value.

    A conditional as a loop of 0 or 1 iterations, because XLA copies the operands of `lax.cond`.
    """
    return lax.fori_loop(0, on.astype(jnp.int32), lambda _, value: fn(value), value)
