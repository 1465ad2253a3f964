"""One stage of a pipeline: its layers' steps, forward and backward, as work that takes turns.

All ranks run one program, so every slot of a stage has the code of a MoE layer. A dense layer is
one that sends no token to experts and whose wide network stands in for the shared experts; a slot
without a layer has zeros for weights, and changes nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.block import Block
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.overlapped.layer_pass import LayerKind, LayerPass
from deepseek_jax.model.overlapped.residuals import Residuals, deferred_gradients
from deepseek_jax.model.router import Routing
from deepseek_jax.parallel.overlap import Steps, with_scope


def turns(slots: int, hops: int) -> list[str]:
    """A forward chunk ("f") beside a backward chunk ("b") of as many slots.

    One's messages are beside the other's matmuls, as in figure 4 of the report:

        f   attention      dispatch   experts          combine
        b   combine grad.  experts    dispatch grad.   attention
    """
    f, b = "f" * hops, "b" * hops
    return ["ff" + b, f + "bb", "fff" + b, f + "bb"] * slots


@dataclasses.dataclass(frozen=True)
class LayerSlot:
    """A layer of one rank's chunk.

    Attributes:
      modules: those of a `Block`, by name: attention_norm, attention, feed_norm, router, experts,
        and where there are any shared, dense.
      kind: of the layer that is here, on this rank.
    """

    modules: dict[str, Any]
    kind: LayerKind


def single_layer(block: Block) -> LayerSlot:
    """A MoE `Block` that is all there is in a stage."""
    modules = {name: getattr(block, name) for name in ("attention_norm", "attention", "feed_norm")}
    modules |= {name: getattr(block.feed, name) for name in ("router", "experts")}
    if block.feed.config.shared_experts:
        modules["shared"] = block.feed.shared
    return LayerSlot(modules, LayerKind(routed=jnp.bool_(True), dense=jnp.bool_(False)))


def weights(modules: dict[str, Any]) -> dict[str, Any]:
    """As a `LayerPass` wants them."""
    norm, shared = modules["feed_norm"], modules.get("shared")
    wide = (modules["dense"],) if "dense" in modules else ()
    return {
        "attend": (modules["attention_norm"], modules["attention"]),
        "gate": (norm, modules["router"]),
        "experts": modules["experts"].weights(),
        "shared": (norm, shared, *wide) if shared is not None or wide else None,
    }


@dataclasses.dataclass
class Stage:
    """The layers of one chunk.

    Attributes:
      slots: in order; those without a layer last.
      how: as a model runs them.
      experts: E.
      balance: () what a sequence's balance loss counts in the objective.
      defer: leave the weights' gradients to `rest_of_backward`.
      traced: of each slot the structure of what forward keeps and the shapes of its routing: known
        once a forward pass was traced.
      missing: of each slot the structure of what backward leaves.
    """

    slots: list[LayerSlot]
    how: Execution
    experts: int
    balance: jax.Array
    defer: bool = False
    traced: list[Any] = dataclasses.field(default_factory=list)
    deferred: list[Any] = dataclasses.field(default_factory=list)

    def forward(self, x: jax.Array, on: jax.Array) -> Steps[tuple[jax.Array, Any, Any]]:
        """x BSD -> BSD, what backward needs, and (load, balance, traffic) stacked over slots."""
        kept, sums, self.traced = [], [], []
        for slot in self.slots:
            flight = self._flight(slot, on)
            work = flight.forward(x, shared=flight.weights["shared"] is not None)
            yield from with_scope("layer", work)
            x, routing = flight.result()
            held = flight.kept()
            kept.append(held.leaves)
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), routing
            )
            self.traced.append((held.structure, shapes))
            routed = (routing.load, routing.balance, routing.traffic)
            sent = flight.kind.routed
            sums.append(jax.tree.map(lambda value, sent=sent: jnp.where(sent, value, 0), routed))
        return x, kept, jax.tree.map(lambda *parts: jnp.stack(parts), *sums)

    def backward(
        self, kept: Any, d_x: jax.Array, on: jax.Array
    ) -> Steps[tuple[jax.Array, list[dict[str, Any]], list[Any]]]:
        """The gradient of what forward returned -> that of its x, float32 ones of each slot, and
        of what others are to be made."""
        gradients: list[Any] = []
        later: list[Any] = []
        self.deferred = []
        layers = zip(self.slots, kept, self.traced, strict=True)
        for slot, leaves, (structure, routing) in reversed(list(layers)):
            flight = self._flight(slot, on)
            balance = jnp.where(flight.kind.routed, self.balance, 0.0)
            d_routing = _pull_of_balance(routing, balance)
            flight.restore(Residuals(leaves, structure), (d_x, d_routing))
            work = flight.backward(shared=flight.weights["shared"] is not None)
            yield from with_scope("layer", work)
            d_x = flight.d_x
            gradients.append(_of_modules(slot, flight.gradients()))
            if self.defer:
                left = flight.deferred()
                later.append(left.leaves)
                self.deferred.append(left.structure)
        return d_x, gradients[::-1], later

    def rest_of_backward(self, later: list[Any]) -> list[dict[str, Any]]:
        """The gradients that backward left, of each slot."""
        layers = zip(reversed(self.slots), later, self.deferred, strict=True)
        return [
            _of_modules(
                slot, deferred_gradients(weights(slot.modules), Residuals(leaves, structure))
            )
            for slot, leaves, structure in layers
        ][::-1]

    def _flight(self, slot: LayerSlot, on: jax.Array) -> LayerPass:
        kind = dataclasses.replace(slot.kind, routed=slot.kind.routed & on)
        recompute_all = self.how.remat.recompute_all
        return LayerPass(
            self.how, self.experts, weights(slot.modules), kind, self.defer, recompute_all
        )


def _of_modules(slot: LayerSlot, gradients: dict[str, Any]) -> Any:
    """Gradients of a flight's weights, as float32 ones of the modules that they are in."""
    _, pull = jax.vjp(weights, slot.modules)
    return _wide(pull(gradients)[0])


def _pull_of_balance(routing: Routing, balance: jax.Array) -> Routing:
    """What the objective asks of a layer's routing: its balance, and nothing else."""

    def nothing(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return dataclasses.replace(jax.tree.map(nothing, routing), balance=balance)


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
