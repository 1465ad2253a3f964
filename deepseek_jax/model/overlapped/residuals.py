"""What backward needs of a layer pass, and what it leaves for later."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.pipeline.split_backward import Later
from deepseek_jax.precision.saved import Saved, save


def deferred_gradients(weights: Any, missing: "Residuals") -> Any:
    """The gradients of weights that a flight which defers them left."""
    left = with_weights(weights, missing)
    return jax.tree.map(lambda later: later.make(), left, is_leaf=is_deferred)


def with_zeros_for_deferred(weights: Any, gradients: Any) -> Any:
    """The gradients, with zeros for what is to be made later."""

    def one(gradient: Any, weight: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, weight) if is_deferred(gradient) else gradient

    return jax.tree.map(one, gradients, weights, is_leaf=is_deferred)


def is_deferred(x: Any) -> bool:
    """Whether x is a gradient that is deferred, for use as `is_leaf`."""
    return isinstance(x, Later)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """A pytree, every array in it once, without those that are weights: these are not kept.

    Attributes:
      leaves: what is kept.
      structure: of the whole tree, and for each of its leaves (whether it is a weight, its number
        among the weights or the kept).
    """

    leaves: list[jax.Array]
    structure: Any = dataclasses.field(metadata=dict(static=True))


def without_weights(weights: Any, tree: Any) -> Residuals:
    """Residuals of a tree, without the arrays that are leaves of `weights`."""
    leaves, structure = jax.tree.flatten(tree)
    number = {id(weight): i for i, weight in enumerate(jax.tree.leaves(weights))}
    rest = {id(leaf): leaf for leaf in leaves if id(leaf) not in number}
    place = {leaf: i for i, leaf in enumerate(rest)}
    which = tuple(
        (True, number[id(leaf)]) if id(leaf) in number else (False, place[id(leaf)])
        for leaf in leaves
    )
    # Named, so that recomputing the layer around it keeps it too.
    kept = save(Saved.LAYER_PASS, list(rest.values()))
    return Residuals(kept, (structure, which))


def with_weights(weights: Any, kept: Residuals) -> Any:
    """Tree that `without_weights` took apart, with the same weights."""
    structure, which = kept.structure
    known = jax.tree.leaves(weights)
    return jax.tree.unflatten(
        structure, [known[i] if weight else kept.leaves[i] for weight, i in which]
    )
