"""From logits to tokens, each request by its own settings and its own random numbers."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """How requests B choose tokens.

    Attributes:
      temperature: float32; 0 takes the most likely token.
      top_p: float32 in (0, 1]: the fewest most likely tokens that have at least this much.
      seed: uint32; with the position it makes all random numbers of a request, so that a sample
        does not depend on its neighbours.
    """

    temperature: jax.Array
    top_p: jax.Array
    seed: jax.Array


def distribution(logits: jax.Array, settings: Settings) -> jax.Array:
    """What tokens are drawn from: logits B...V float32 -> probabilities B...V that sum to one."""
    best = jax.nn.one_hot(most_likely(logits), logits.shape[-1], dtype=jnp.float32)
    temperature = _beside(settings.temperature, logits)

    def drawn() -> jax.Array:
        heat = jnp.where(temperature > 0, temperature, 1.0)
        warm = jax.nn.softmax(logits / heat, axis=-1)
        cut = lax.cond((settings.top_p < 1).any(), lambda: _nucleus(warm, settings), lambda: warm)
        return jnp.where(temperature > 0, cut, best)

    return lax.cond((settings.temperature > 0).any(), drawn, lambda: best)


def _nucleus(probabilities: jax.Array, settings: Settings) -> jax.Array:
    """Zero outside the fewest tokens that together reach `top_p`, equal ones with the last."""
    falling = -jnp.sort(-probabilities, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    inside = before < _beside(settings.top_p, probabilities)
    least = jnp.min(jnp.where(inside, falling, jnp.inf), axis=-1, keepdims=True)
    kept = jnp.where(probabilities >= least, probabilities, 0.0)
    return kept / kept.sum(-1, keepdims=True)


def _beside(setting: jax.Array, x: jax.Array) -> jax.Array:
    return setting.reshape(setting.shape + (1,) * (x.ndim - 1))


def draw(
    chances: jax.Array, settings: Settings, positions: jax.Array, purpose: int = 0
) -> jax.Array:
    """One token of each BV, for `positions` B of their requests -> B int32.

    Args:
      chances: at least 0, as they relate to one another; where it is 0 a token is never drawn.
      purpose: of the random number, see `uniform`.
    """

    def drawn() -> jax.Array:
        up_to = jnp.cumsum(chances, axis=-1)
        mark = uniform(settings, positions, purpose)[:, None] * up_to[:, -1:]
        beyond = (up_to > mark) & (chances > 0)
        return jnp.where(beyond.any(-1), beyond.argmax(-1), most_likely(chances))  # or by rounding

    warm = (settings.temperature > 0).any()
    return lax.cond(warm, drawn, lambda: most_likely(chances)).astype(jnp.int32)


def uniform(settings: Settings, positions: jax.Array, purpose: int) -> jax.Array:
    """A number in [0, 1) for each of B requests; `purpose` tells apart those of one position."""

    def one(seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.uniform(jax.random.fold_in(key, purpose))

    return jax.vmap(one)(settings.seed, positions)


def choose(logits: jax.Array, settings: Settings, positions: jax.Array) -> jax.Array:
    """The tokens of BV that come to stand at `positions` B."""

    def drawn() -> jax.Array:
        return draw(distribution(logits, settings), settings, positions)

    return lax.cond((settings.temperature > 0).any(), drawn, lambda: most_likely(logits))


def most_likely(scores: jax.Array) -> jax.Array:
    """The first of the largest: ...V -> ... int32.

    As `argmax`, which XLA does not vectorise on CPUs: two passes take a seventh of its time.
    """
    number = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    largest = scores == scores.max(-1, keepdims=True)
    return jnp.where(largest, number, scores.shape[-1] - 1).min(-1)
