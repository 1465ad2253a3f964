"""Sampling: logits to tokens, with settings and random numbers per request.

B requests, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling settings of B requests.

    Attributes:
      temperature: B float32; 0 takes the most likely token.
      top_p: B float32 in (0, 1]; samples from the fewest tokens whose probability reaches it.
      seed: B uint32; seed and position determine every random number of a request, so that its
        sample does not depend on other requests.
    """

    temperature: jax.Array
    top_p: jax.Array
    seed: jax.Array


def distribution(logits: jax.Array, settings: Settings) -> jax.Array:
    """Probabilities B...V to sample from, which sum to one, of logits B...V float32."""
    best = jax.nn.one_hot(most_likely(logits), logits.shape[-1], dtype=jnp.float32)
    temperature = _beside(settings.temperature, logits)

    def drawn() -> jax.Array:
        heat = jnp.where(temperature > 0, temperature, 1.0)
        warm = jax.nn.softmax(logits / heat, axis=-1)
        cut = lax.cond((settings.top_p < 1).any(), lambda: _nucleus(warm, settings), lambda: warm)
        return jnp.where(temperature > 0, cut, best)

    return lax.cond((settings.temperature > 0).any(), drawn, lambda: best)


def _nucleus(probabilities: jax.Array, settings: Settings) -> jax.Array:
    """Renormalised probabilities of the fewest tokens that reach `top_p`, ties of the last kept."""
    falling = -jnp.sort(-probabilities, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    inside = before < _beside(settings.top_p, probabilities)
    least = jnp.min(jnp.where(inside, falling, jnp.inf), axis=-1, keepdims=True)
    kept = jnp.where(probabilities >= least, probabilities, 0.0)
    return kept / kept.sum(-1, keepdims=True)


def _beside(setting: jax.Array, x: jax.Array) -> jax.Array:
    """`setting` B with trailing dimensions of size one, to broadcast against x B...."""
    return setting.reshape(setting.shape + (1,) * (x.ndim - 1))


def draw(
    chances: jax.Array, settings: Settings, positions: jax.Array, purpose: int = 0
) -> jax.Array:
    """Draws one token per request -> B int32.

    Args:
      chances: BV, probabilities up to a factor; a token of probability 0 is never drawn.
      settings: Sampling settings.
      positions: B, position of the token in its request.
      purpose: Purpose of the random number, see `uniform`.
    """

    def drawn() -> jax.Array:
        up_to = jnp.cumsum(chances, axis=-1)
        mark = uniform(settings, positions, purpose)[:, None] * up_to[:, -1:]
        beyond = (up_to > mark) & (chances > 0)
        # Rounding may leave no token beyond the mark.
        return jnp.where(beyond.any(-1), beyond.argmax(-1), most_likely(chances))

    warm = (settings.temperature > 0).any()
    return lax.cond(warm, drawn, lambda: most_likely(chances)).astype(jnp.int32)


def uniform(settings: Settings, positions: jax.Array, purpose: int) -> jax.Array:
    """Random numbers B in [0, 1), a different one for each seed, position and `purpose`."""

    def one(seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.uniform(jax.random.fold_in(key, purpose))

    return jax.vmap(one)(settings.seed, positions)


def choose(logits: jax.Array, settings: Settings, positions: jax.Array) -> jax.Array:
    """Samples tokens B for `positions` B from logits BV."""

    def drawn() -> jax.Array:
        return draw(distribution(logits, settings), settings, positions)

    return lax.cond((settings.temperature > 0).any(), drawn, lambda: most_likely(logits))


def most_likely(scores: jax.Array) -> jax.Array:
    """Index of the first largest score: ...V -> ... int32.

    It equals `argmax`, which XLA does not vectorise on CPUs; these two passes take a seventh of its
    time (measured).
    """
    number = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    largest = scores == scores.max(-1, keepdims=True)
    return jnp.where(largest, number, scores.shape[-1] - 1).min(-1)
