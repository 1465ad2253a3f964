"""The dispatch without transport: every expert sees every token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.experts.exchange import Exchange, Received
from deepseek_jax.precision.einsum import broadcast
from deepseek_jax.precision.linear_input import TiledArray, empty_like, numbers
from deepseek_jax.precision.payload import Payload


@dataclasses.dataclass(frozen=True)
class ReferenceDispatch:
    """Every expert sees every token, with weight 0 where not chosen: E/K times the work.

    Attributes:
      payload: encoding whose rounding tokens and gradients undergo, as if they had travelled.
    """

    payload: Payload

    @property
    def in_steps(self) -> None:
        """None, for nothing travels."""
        return None

    def send(self, exchange: Exchange) -> Received:
        """Replicates all tokens for every expert, rows (EM)D; there is no communication plan."""
        if axes.size("experts") > 1:
            raise ConfigError(
                "layout.dispatch=reference needs all experts on every device; set it to flat"
            )
        total, left = exchange.total, exchange.left
        count = exchange.tokens.shape[0]
        weights = jnp.where(left, exchange.weights, 0.0)
        spread = jax.nn.one_hot(exchange.chosen, total) * weights[..., None]  # MKE
        tokens = _travel(exchange.tokens, self.payload)
        rows = broadcast(tokens, (total, *tokens.shape)).reshape(-1, tokens.shape[1])  # (EM)D
        sizes = jnp.full((total,), count, jnp.int32)
        return Received(rows, spread.sum(1).T.reshape(-1), sizes, left, total * count)

    def combine(self, out: jax.Array | TiledArray, route: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(EM)D -> MD, the sum over experts; and MK bool, the choices that were sent."""
        total = numbers(out).shape[0] // route.shape[0]
        return _return(out, self.payload).reshape(total, route.shape[0], -1).sum(0), route

    def complete(self, tokens: int, top_k: int, total: int) -> bool:
        """True: there are no buffers."""
        return True

    def unbounded(self) -> "ReferenceDispatch":
        """The same: there are no buffers."""
        return self


# Rounding of the payload, where nothing travels.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _travel(tokens: jax.Array, payload: Payload) -> jax.Array:
    return payload.decode(payload.encode(tokens), tokens.dtype)


_travel.defvjp(lambda tokens, payload: (_travel(tokens, payload), None), lambda *a: (a[-1],))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _return(out: jax.Array | TiledArray, payload: Payload) -> jax.Array:
    return numbers(out)


_return.defvjp(
    lambda out, payload: (numbers(out), jax.tree.map(empty_like, out)),
    lambda payload, like, dy: (payload.gradient(payload.encode(dy), like),),
)
