"""Residuals of a layer pass without its weights, and gradients that it leaves for later."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.pipeline.split_backward import Later
from deepseek_jax.precision import weight_gradients
from deepseek_jax.precision.saved import Saved, save


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """A pytree that saves each of its arrays once, and none of those that are weights.

    The structure is static and complete: `with_weights` needs nothing else of the trace that made
    it. Structures of two traces of one function differ, but each reads the other's leaves.

    Attributes:
      leaves: arrays that are saved.
      structure: treedef of the whole tree; and for each of its leaves whether it is a weight, and
        its number among the weights or the saved arrays.
    """

    leaves: list[jax.Array]
    structure: Any = dataclasses.field(metadata=dict(static=True))


def without_weights(weights: Any, tree: Any) -> Residuals:
    """A tree as residuals, given the weights that need not be saved."""
    leaves, structure = jax.tree.flatten(tree)
    number = {id(weight): i for i, weight in enumerate(jax.tree.leaves(weights))}
    rest = {id(leaf): leaf for leaf in leaves if id(leaf) not in number}
    place = {leaf: i for i, leaf in enumerate(rest)}
    which = tuple(
        (True, number[id(leaf)]) if id(leaf) in number else (False, place[id(leaf)])
        for leaf in leaves
    )
    # Named, so that a checkpoint around the layer saves them too.
    return Residuals(save(Saved.LAYER_PASS, list(rest.values())), (structure, which))


def with_weights(weights: Any, residuals: Residuals) -> Any:
    """Rebuilds the tree of residuals, with the weights in their places again."""
    structure, which = residuals.structure
    known = jax.tree.leaves(weights)
    return jax.tree.unflatten(
        structure, [known[i] if weight else residuals.leaves[i] for weight, i in which]
    )


def deferred_gradients(weights: Any, deferred: Residuals) -> Any:
    """Gradients of weights that a layer pass deferred; those that it made are None."""
    left = with_weights(weights, deferred)
    return jax.tree.map(lambda later: later.make(), left, is_leaf=is_deferred)


def with_zeros_for_deferred(weights: Any, gradients: Any) -> Any:
    """Gradients of weights, with zeros where they are deferred."""

    def each(gradient: Any, weight: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, weight) if is_deferred(gradient) else gradient

    arrays = weight_gradients.carriers(weights)
    return jax.tree.map(each, gradients, arrays, is_leaf=is_deferred)


def is_deferred(x: Any) -> bool:
    """Whether a gradient is deferred."""
    return isinstance(x, Later)
