"""An exchange of a layer with its experts: what is sent, what arrives, and who carries it.

M tokens of this device, K chosen experts of each, E experts in all, D model width, S slots for the
copies that this device's experts work on.
"""

import dataclasses
from typing import Any, Protocol

import jax

from deepseek_jax.parallel.overlap import Steps
from deepseek_jax.precision.linear_input import TiledArray
from deepseek_jax.precision.payload import Payload
from deepseek_jax.precision.saved import Saved, save


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exchange:
    """Tokens of this device, the experts that each chose, and the weights of the experts here.

    Attributes:
      tokens: MD.
      weights: MK float32, routing weights.
      chosen: MK int32 in [0, total), distinct for each token.
      left: MK bool, choices that no round has served yet.
      total: E.
      experts: pytree, weights of this device's experts; None where only the transport matters.
    """

    tokens: jax.Array
    weights: jax.Array
    chosen: jax.Array
    left: jax.Array
    total: int = dataclasses.field(metadata=dict(static=True))
    experts: Any = None

    def after(self, served: jax.Array) -> "Exchange":
        """The same exchange after a round that served these choices, MK bool."""
        return dataclasses.replace(self, left=save(Saved.ROUTE, self.left & ~served))


def cotangent(total: int, tokens: jax.Array, weights: jax.Array, experts: Any = None) -> Exchange:
    """Gradients of an exchange's tokens, routing weights and experts; None for the choices."""
    nothing: Any = None
    return Exchange(tokens, weights, nothing, nothing, total, experts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Received:
    """Copies of tokens that reached this device's experts.

    Attributes:
      rows: SD in the recipe's dtype, with FP8 tiles of them if the payload has these, or as the
        payload encodes them; sorted by expert, zero past the last copy.
      weights: S float32, routing weights.
      sizes: int32, rows of each local expert.
      route: slots of the copies, by which `combine` returns results.
      likely: rows of the S that a balanced router fills.
      slow_hop_words: RW, rows received over the slow hop, before the fast hop copies each to its
        experts: half as many as `rows` in V3 (8 experts on 4 nodes). None without two hops.
    """

    rows: Any
    weights: jax.Array
    sizes: jax.Array
    route: Any
    likely: int = dataclasses.field(metadata=dict(static=True))
    slow_hop_words: jax.Array | None = None


class Dispatch(Protocol):
    """Transport of tokens to their experts and back."""

    @property
    def payload(self) -> Payload:
        """Encoding in which tokens travel."""
        ...

    @property
    def in_steps(self) -> "SteppedDispatch | None":
        """The same dispatch with a step for each hop; None where nothing travels."""
        ...

    def send(self, exchange: Exchange) -> Received:
        """Sends the choices that are left to their experts."""
        ...

    def combine(self, out: jax.Array | TiledArray, route: Any) -> tuple[jax.Array, jax.Array]:
        """out SD -> MD, the sum over each token's copies; and MK bool, which choices it holds."""
        ...

    def complete(self, tokens: int, top_k: int, total: int) -> bool:
        """Whether the buffers hold whatever a router may choose, so that one round serves all."""
        ...

    def unbounded(self) -> "Dispatch":
        """The same dispatch with buffers for any router at all: for few tokens, that is little."""
        ...


class SteppedDispatch(Protocol):
    """A dispatch in steps, one for each hop, and its gradients in steps.

    In these, rows are as they travel: `payload.received` makes numbers of them.
    """

    @property
    def payload(self) -> Payload:
        """Encoding in which tokens travel."""
        ...

    def hop_axes(self) -> list[tuple[str, ...]]:
        """Mesh axes of each hop, outermost first."""
        ...

    def sending(self, exchange: Exchange) -> Steps[Received]:
        """`send` in steps."""
        ...

    def send_gradient(
        self, d_rows: jax.Array, d_weights: jax.Array, route: Any
    ) -> Steps[tuple[jax.Array, jax.Array]]:
        """Gradients of SD and S -> those of MD and MK."""
        ...

    def combining(self, out: jax.Array, route: Any) -> Steps[tuple[jax.Array, jax.Array]]:
        """`combine` in steps."""
        ...

    def combine_gradient(
        self, d_out: jax.Array, route: Any, slow_hop_words: jax.Array | None = None
    ) -> Steps[tuple[Any, Any]]:
        """Gradient of MD -> that of SD.

        Args:
          slow_hop_words: those of `Received` in the forward dispatch. The gradient's last message
            then resends the tokens' rows, so that forward need not save them.

        Returns:
          The gradient's rows and the tokens' rows, both as they travel; of the latter none without
          `slow_hop_words`.
        """
        ...
