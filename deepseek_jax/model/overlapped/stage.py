"""A pipeline stage: forward and backward of its layers in steps, to be interleaved.

All ranks run one program, so every slot of a stage has the code of a MoE layer. A dense layer sends
no token to experts, and its wide network replaces the shared experts; a slot without a layer has
zeros for weights, and changes nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.execution import Execution
from deepseek_jax.model.overlapped.layer_modules import LayerKind, block_modules, layer_weights
from deepseek_jax.model.overlapped.layer_pass import LayerPass
from deepseek_jax.model.overlapped.residuals import Residuals, deferred_gradients
from deepseek_jax.parallel.overlap import Steps, side_by_side, with_scope
from deepseek_jax.precision import weight_gradients


def turns(slots: int, hops: int) -> list[str]:
    """The turns of a forward chunk ("f") and a backward chunk ("b") of as many slots.

    Messages of one stand beside matmuls of the other, as in figure 4 of the report, each beside
    a part of them. With two hops:

        f   attention           hop     hop        gate_up, shared   down           hop, hop
        b   hop, hop, shared    down    gate_up    hop               hop, weights   attention
    """
    f, b = "f" * hops, "b" * hops
    return ["ff" + b, *side_by_side(f, "bb"), *side_by_side("ff", b), f + "b"] * slots


@dataclasses.dataclass(frozen=True)
class LayerSlot:
    """A slot for a layer in one rank's chunk.

    Attributes:
      modules: modules of a `Block` by name: attention_norm, attention, feed_norm, router, experts,
        and shared and dense if there are any.
      kind: kind of the layer that this rank has in the slot.
    """

    modules: dict[str, Any]
    kind: LayerKind


def single_layer(block: Any) -> LayerSlot:
    """A MoE `Block` as the only layer of a stage."""
    return LayerSlot(
        block_modules(block), LayerKind(routed=jnp.bool_(True), dense=jnp.bool_(False))
    )


@dataclasses.dataclass(frozen=True)
class Stage:
    """The layers of one chunk.

    Attributes:
      slots: in order; slots without a layer last.
      how: recipe, dispatch and recompute policy.
      experts: E.
      balance: (), weight of a layer's balance loss in the objective.
      defer: whether backward leaves gradients of weights to `weight_backward`.
      index: (), weight of the loss of a layer's indexer; None where none is computed.
    """

    slots: list[LayerSlot]
    how: Execution
    experts: int
    balance: jax.Array
    defer: bool = False
    index: jax.Array | None = None

    def forward(self, x: jax.Array, on: jax.Array) -> Steps[tuple[jax.Array, list[Residuals], Any]]:
        """x BSD -> BSD, residuals, and (load, balance, traffic, index loss), stacked over slots."""
        kept: list[Residuals] = []
        sums: list[Any] = []
        for slot in self.slots:
            layer = self._layer(slot, on)
            forward = layer.forward(x)
            steps = forward.steps(shared=True)
            yield from with_scope("layer", steps)
            x, routing, residuals = forward.result()
            kept.append(residuals)
            routed = (routing.load, routing.balance, routing.traffic)
            sent = layer.kind.routed
            routed = jax.tree.map(lambda value, sent=sent: jnp.where(sent, value, 0), routed)
            sums.append((*routed, _of_layer(slot, on, routing.index_loss)))
        return x, kept, jax.tree.map(lambda *parts: jnp.stack(parts), *sums)

    def backward(
        self, kept: list[Residuals], d_x: jax.Array, on: jax.Array
    ) -> Steps[tuple[jax.Array, list[dict[str, Any]], list[Residuals]]]:
        """Gradient of the output -> that of the input BSD, and of each slot's modules in float32.

        Returns:
          Both, and residuals of each slot for the gradients that `weight_backward` makes.
        """
        gradients: list[Any] = []
        later: list[Residuals] = []
        for slot, residuals in reversed(list(zip(self.slots, kept, strict=True))):
            layer = self._layer(slot, on)
            balance = jnp.where(layer.kind.routed, self.balance, 0.0)
            index = _of_layer(slot, on, self.index)
            d_routing = layer.routing_gradient(d_x, balance, index)
            backward = layer.backward(residuals, d_x, d_routing)
            steps = backward.steps(shared=True)
            yield from with_scope("layer", steps)
            d_x = backward.d_x
            gradients.append(_of_modules(slot, backward.gradients()))
            if self.defer:
                later.append(backward.deferred())
        return d_x, gradients[::-1], later[::-1]

    def weight_backward(self, later: list[Residuals]) -> list[dict[str, Any]]:
        """The gradients that backward deferred, of each slot."""
        return [
            _of_modules(slot, deferred_gradients(layer_weights(slot.modules), residuals))
            for slot, residuals in zip(self.slots, later, strict=True)
        ]

    def _layer(self, slot: LayerSlot, on: jax.Array) -> LayerPass:
        return LayerPass(
            self.how,
            self.experts,
            layer_weights(slot.modules),
            dataclasses.replace(slot.kind, routed=slot.kind.routed & on),
            self.defer,
            self.how.remat.recompute_all,
            self.how.remat.resend,
        )


@dataclasses.dataclass(frozen=True)
class StageChunks:
    """The part of an executor's `Stages` that runs the layers of this rank's chunks.

    Attributes:
      chunks: one stage for each chunk.
    """

    chunks: list[Stage]

    def forward(self, chunk: int, x: jax.Array, on: jax.Array) -> Steps[Any]:
        return self.chunks[chunk].forward(x, on)

    def backward(self, chunk: int, kept: Any, d_y: jax.Array, on: jax.Array) -> Steps[Any]:
        return self.chunks[chunk].backward(kept, d_y, on)

    def weight_backward(self, chunk: int, later: Any) -> Any:
        return self.chunks[chunk].weight_backward(later)


def _of_layer(slot: LayerSlot, on: jax.Array, value: jax.Array | None) -> jax.Array | None:
    """The value where this rank has a layer in the slot and the work counts, else 0; None stays."""
    if value is None:
        return None
    return jnp.where((slot.kind.routed | slot.kind.dense) & on, value, 0.0)


def _of_modules(slot: LayerSlot, gradients: dict[str, Any]) -> Any:
    """Gradients of `layer_weights` -> float32 gradients of the modules that they are in."""
    _, vjp = jax.vjp(layer_weights, weight_gradients.carriers(slot.modules))
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), vjp(gradients)[0])
