"""What a loop over ticks carries: pools of slots, sums, and what changes only in some turns."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.overlap import Steps, run_to_end


def zeros(tree: Any) -> Any:
    """Of these shapes and dtypes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def pool(like: Any, slots: int) -> jax.Array:
    """Room for so many arrays like this one."""
    return jnp.zeros((slots, *like.shape), like.dtype)


def read(pool: jax.Array, slot: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(pool, slot, 0, keepdims=False)


def write(pool: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(pool, value, slot, 0)


@dataclasses.dataclass(frozen=True)
class SharedPools:
    """Pools for trees of several kinds: arrays that are alike in two of them share one.

    Attributes:
      likes: of each pool, an array's shape and dtype.
      pool_of: [kind][leaf] -> number of its pool.
      trees: the structure of each kind.
    """

    likes: list[Any]
    pool_of: list[list[int]]
    trees: list[Any]

    @classmethod
    def of(cls, kinds: Sequence[Any]) -> "SharedPools":
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
        return [pool(like, slots) for like in self.likes]

    def read(self, pools: list[jax.Array], kind: int, slot: jax.Array) -> Any:
        leaves = [read(pools[number], slot) for number in self.pool_of[kind]]
        return jax.tree.unflatten(self.trees[kind], leaves)

    def write(
        self, pools: list[jax.Array], kind: int, slot: jax.Array, tree: Any
    ) -> list[jax.Array]:
        """What other kinds alone have is left as it is."""
        new = dict(zip(self.pool_of[kind], jax.tree.leaves(tree), strict=True))
        return [write(p, slot, new[i]) if i in new else p for i, p in enumerate(pools)]


def accumulated(totals: list[Any], chunk: int, more: Any, on: jax.Array) -> list[Any]:
    """What idle work made is dropped, whatever it is."""
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
    """fn(value) or value. Unlike a conditional, a loop of one or no turn copies neither."""
    return lax.fori_loop(0, on.astype(jnp.int32), lambda _, value: fn(value), value)
