"""Gradients of prepared weights, whatever a recipe makes of them.

A gradient has the shape of the weight's master, in one array. The weight itself may be a pytree,
as `Fp8Weight`, of which no leaf can have that gradient: code that differentiates passes weights
through these functions, and never asks for the recipe. Arrays pass unchanged.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.precision.fp8_weights import Fp8Weight


def carriers(weights: Any) -> Any:
    """The arrays that a function of `weights` is differentiated by: one for each weight.

    For an FP8 weight they are zeros in float32 that nothing reads, so XLA allocates none.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Fp8Weight):
            return leaf
        return jnp.zeros(leaf.shape, jnp.float32) if leaf.carrier is None else leaf.carrier

    return jax.tree.map(one, weights, is_leaf=_is_fp8)


def with_carriers(weights: Any, arrays: Any) -> Any:
    """The weights, as a function of the arrays that `carriers` returned."""

    def one(leaf: Any, array: Any) -> Any:
        if not isinstance(leaf, Fp8Weight):
            return array
        return Fp8Weight(leaf.values, leaf.scales, array)

    return jax.tree.map(one, weights, arrays, is_leaf=_is_fp8)


def without_carriers(weights: Any) -> Any:
    """The weights as arrays that carry no gradient, for residuals."""

    def one(leaf: Any) -> Any:
        return Fp8Weight(leaf.values, leaf.scales) if isinstance(leaf, Fp8Weight) else leaf

    return jax.tree.map(one, weights, is_leaf=_is_fp8)


def cotangents(weights: Any, gradients: Any) -> Any:
    """Gradients of `weights` in their structure, as a VJP rule must return them."""

    def one(leaf: Any, gradient: Any) -> Any:
        if not isinstance(leaf, Fp8Weight):
            return gradient
        nothing: Any = None
        return Fp8Weight(nothing, nothing, gradient)

    return jax.tree.map(one, weights, gradients, is_leaf=_is_fp8)


def vjp(fn: Callable[..., Any], weights: Any, *inputs: Any, has_aux: bool = False) -> Any:
    """`jax.vjp` of fn(weights, *inputs), whose function returns one array for each weight."""
    weights, arrays = without_carriers(weights), carriers(weights)

    def of_arrays(arrays: Any, *inputs: Any) -> Any:
        return fn(with_carriers(weights, arrays), *inputs)

    if has_aux:
        return jax.vjp(of_arrays, arrays, *inputs, has_aux=True)
    return jax.vjp(of_arrays, arrays, *inputs)


def _is_fp8(x: Any) -> bool:
    return isinstance(x, Fp8Weight)
