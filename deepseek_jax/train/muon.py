"""Muon: momentum whose matrices are orthogonalised by Newton-Schulz steps (Jordan et al., 2024).

    M' = beta M + (1 - beta) G;  N = beta M' + (1 - beta) G, both without their bias
    O = NewtonSchulz5(N / |N|);  update = rms sqrt(max(in, out)) O

The update is that of `optax.contrib.scale_by_muon` in its Nesterov form; the factor, of Moonlight
(arXiv 2502.16982), gives it the size of Adam's updates, so that both take one learning rate.

Muon moves the matrices of linear layers: those of attention, of feed-forward networks and of
experts, and the MTP projections, each layer's and each expert's matrix alone, gate and up apart, a
projection of all heads as one matrix. Adam moves the rest: embedding, head, router centroids and
norm scales. Router biases have no gradient.

Arrays are whole in the program, in any layout: where a device holds a part of a matrix, as under
ZeRO or tensor parallelism, XLA puts the messages in.
"""

import math
from typing import Any

import jax
import optax
from jax.sharding import AxisType, auto_axes
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from deepseek_jax.model import params as parameters

STEPS = 5  # of Newton-Schulz


def beside(
    adam: optax.GradientTransformation, momentum: float, rms: float, dtype: Any
) -> optax.GradientTransformation:
    """Muon for the matrices of linear layers, and `adam` for all other parameters.

    Args:
      momentum: beta.
      rms: root mean square of an update's elements, before the learning rate.
      dtype: in which the momentum is kept.
    """

    def sized(roles: str | None, update: Any) -> Any:
        wide = max(math.prod(_sizes(roles, update, kind)) for kind in "io")
        return rms * math.sqrt(wide) * update

    muon = optax.chain(
        scale_by_muon(
            ns_steps=STEPS,
            beta=momentum,
            mu_dtype=dtype,
            weight_dimension_numbers=_dimension_numbers,
        ),
        optax.stateless(lambda updates, _: parameters.by_roles(updates, sized, inside=True)),
    )
    return optax.partition({"muon": _in_any_layout(muon), "adam": adam}, _labels)


def _labels(params: Any) -> Any:
    """Name of the transformation of each parameter."""
    return parameters.by_roles(params, lambda roles, _: "adam" if roles is None else "muon")


def _dimension_numbers(updates: Any) -> Any:
    """Dimensions of each matrix: inputs, outputs, and the others, along which matrices are many."""

    def numbers(roles: str | None, update: Any) -> MuonDimensionNumbers:
        return MuonDimensionNumbers(*(_dimensions(roles, update, kind) for kind in "io"))

    return parameters.by_roles(updates, numbers, inside=True)


def _dimensions(roles: str | None, update: Any, kind: str) -> tuple[int, ...]:
    """Dimensions of an update that are inputs, "i", or outputs, "o", of its matrices."""
    assert roles is not None  # a linear layer's, by `_labels`
    first = update.ndim - len(roles)  # after the layers of a stack
    return tuple(first + number for number, role in enumerate(roles) if role == kind)


def _sizes(roles: str | None, update: Any, kind: str) -> tuple[int, ...]:
    return tuple(update.shape[number] for number in _dimensions(roles, update, kind))


def _in_any_layout(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same for arrays of any placement, which their updates keep."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        places = jax.tree.map(lambda x: jax.typeof(x).sharding, (grads, state))
        explicit = any(
            AxisType.Explicit in place.mesh.axis_types for place in jax.tree.leaves(places)
        )
        if not explicit:
            return muon.update(grads, state)
        return auto_axes(muon.update, out_sharding=places)(grads, state)

    return optax.GradientTransformation(muon.init, update)
