"""What a loop over ticks carries: pools of slots, sums, and what changes only in some turns."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


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


def added(totals: list[Any], chunk: int, more: Any, on: jax.Array) -> list[Any]:
    """What idle work made is dropped, whatever it is."""
    sums = jax.tree.map(lambda old, new: old + jnp.where(on, new, 0), totals[chunk], more)
    return [sums if c == chunk else total for c, total in enumerate(totals)]


def perhaps(on: jax.Array, fn: Callable[[Any], Any], value: Any) -> Any:
    """fn(value) or value. Unlike a conditional, a loop of one or no turn copies neither."""
    return lax.fori_loop(0, on.astype(jnp.int32), lambda _, value: fn(value), value)
