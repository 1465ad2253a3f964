"""A core without weights and the linear layer that reads its output, which is saved once for both.

Backward of attention by a kernel reads attention's output, and so does the gradient of the layer
behind it, W^O. The report saves it in a format of its own, for it is sensitive to precision in the
former (section 3.3.3). Here forward computes with the output itself; backward of both computes with
what was saved.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax.typing import DTypeLike

from deepseek_jax.precision import e5m6, weight_gradients
from deepseek_jax.precision.fp8_weights import Fp8Weight
from deepseek_jax.precision.saved import Saved, save

Inputs = tuple[jax.Array, ...]


class Core(Protocol):
    """A function of arrays with a backward pass that needs its output."""

    def forward(self, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The output, and an array for backward."""
        ...

    def backward(self, inputs: Inputs, out: jax.Array, rest: jax.Array, d_out: jax.Array) -> Inputs:
        """Gradients of the inputs."""
        ...


@dataclasses.dataclass(frozen=True)
class SavedForm:
    """How an output is saved.

    Attributes:
      encode: ...D -> arrays.
      decode: (arrays, dtype) -> ...D.
    """

    encode: Callable[[jax.Array], Any]
    decode: Callable[[Any, DTypeLike], jax.Array]


UNCHANGED = SavedForm(lambda x: x, lambda x, dtype: x)
E5M6 = SavedForm(e5m6.encode, e5m6.decode)


def from_kept_output(
    form: SavedForm,
    core: Core,
    layer: Callable[[jax.Array, Any], jax.Array],
    inputs: Inputs,
    weight: Any,
) -> jax.Array:
    """layer(core(*inputs), weight), of whose core a recompute policy can save output and rest.

    Args:
      layer: closes over no array.
      weight: a prepared weight; an array, or an `Fp8Weight`.
    """
    trained = not isinstance(weight, Fp8Weight) or weight.carrier is not None

    @jax.custom_vjp
    def run(inputs: Inputs, weight: Any) -> jax.Array:
        return layer(core.forward(*inputs)[0], weight)

    def forward(inputs: Inputs, weight: Any) -> tuple[jax.Array, Any]:
        out, rest = core.forward(*inputs)
        bare = weight_gradients.without_carriers(weight)
        kept = save(Saved.ATTENTION, form.encode(out)), save(Saved.ATTENTION_SUM, rest)
        return layer(out, bare), (inputs, kept, bare)

    def backward(saved: Any, d_layer: jax.Array) -> tuple[Inputs, Any]:
        inputs, (encoded, rest), weight = saved
        out = form.decode(encoded, inputs[0].dtype)
        pull = weight_gradients.vjp(lambda weight, out: layer(out, weight), weight, out)[1]
        d_weight, d_out = pull(d_layer)
        d_inputs = core.backward(inputs, out, rest, d_out)
        return d_inputs, weight_gradients.cotangents(weight, d_weight) if trained else None

    run.defvjp(forward, backward)
    return run(inputs, weight)
