"""Sampling: logits to tokens, with settings and random numbers per request.

B requests, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

COLDEST = 1e-6  # float32 logits have rounding errors of this size: a lower temperature is 0
HOTTEST = 1e30  # the inverse of a higher one is no normal number; all tokens are equal long before


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling settings of B requests.

    Attributes:
      temperature: B float32, from 0 to HOTTEST; below COLDEST it takes the most likely token.
      top_p: B float32 in (0, 1]; samples from the fewest tokens whose probability reaches it.
      seed: B uint32; seed and position determine every random number of a request, so that its
        sample does not depend on other requests.
    """

    temperature: jax.Array
    top_p: jax.Array
    seed: jax.Array

    @property
    def random(self) -> jax.Array:
        """B bool, True for a request whose tokens are drawn, False for the most likely ones."""
        return self.temperature >= COLDEST


def distribution(logits: jax.Array, settings: Settings) -> jax.Array:
    """Probabilities B...V to sample from, of logits B...V float32.

    They sum to one. All are NaN where the largest logit is not finite.
    """
    best = most_likely(logits)[..., None]
    number = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    one_hot = (number == best).astype(jnp.float32)
    greedy = jnp.where(best < logits.shape[-1], one_hot, jnp.nan)
    random = _beside(settings.random, logits)

    def drawn() -> jax.Array:
        heat = jnp.clip(_beside(settings.temperature, logits), COLDEST, HOTTEST)
        # The largest is subtracted first: it becomes exactly 0, and stays that at any temperature.
        shares = jnp.exp((logits - logits.max(-1, keepdims=True)) / heat)
        warm = shares / shares.sum(-1, keepdims=True)
        cut = lax.cond((settings.top_p < 1).any(), lambda: _nucleus(warm, settings), lambda: warm)
        return jnp.where(random, cut, greedy)

    return lax.cond(settings.random.any(), drawn, lambda: greedy)


def _nucleus(probabilities: jax.Array, settings: Settings) -> jax.Array:
    """Renormalised probabilities of the fewest tokens that reach `top_p`, ties of the last kept.

    A token is kept where those above it do not reach `top_p`. The least probability that is kept is
    found by bisection over the bits of floats, which a CPU does in a fraction of a sort's time.
    """
    bits = lax.bitcast_convert_type(probabilities, jnp.int32)  # in the order of the probabilities
    # A share below the least normal number counts as 0 on some devices; the first token is kept.
    top_p = _beside(settings.top_p, probabilities)
    share = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dropped, kept = bounds
        middle = dropped + (kept - dropped) // 2
        above = jnp.where(bits > middle, probabilities, 0.0).sum(-1, keepdims=True)
        return jnp.where(above < share, dropped, middle), jnp.where(above < share, middle, kept)

    most = bits.max(-1, keepdims=True)
    _, least = lax.fori_loop(0, 31, halve, (jnp.full_like(most, -1), most))
    kept = jnp.where(bits >= least, probabilities, 0.0)
    # A sum that rounds to more than 1 must not cut a request that asks for no cut.
    return jnp.where(top_p < 1, kept / kept.sum(-1, keepdims=True), probabilities)


def _beside(setting: jax.Array, x: jax.Array) -> jax.Array:
    """`setting` B with trailing dimensions of size one, to broadcast against x B...."""
    return setting.reshape(setting.shape + (1,) * (x.ndim - 1))


def draw(
    chances: jax.Array, settings: Settings, positions: jax.Array, purpose: int = 0
) -> jax.Array:
    """Draws one token per request -> B int32.

    Args:
      chances: BV, probabilities up to a factor; a token of probability 0 is never drawn. Where one
        is not finite, the token is V, which no vocabulary has.
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

    random = settings.random.any()
    return lax.cond(random, drawn, lambda: most_likely(chances)).astype(jnp.int32)


def uniform(settings: Settings, positions: jax.Array, purpose: int) -> jax.Array:
    """Random numbers B in [0, 1), a different one for each seed, position and `purpose`."""

    def one(seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.uniform(jax.random.fold_in(key, purpose))

    return jax.vmap(one)(settings.seed, positions)


def choose(logits: jax.Array, settings: Settings, positions: jax.Array) -> jax.Array:
    """Samples tokens B for `positions` B from logits BV; V where the largest is not finite."""

    def drawn() -> jax.Array:
        return draw(distribution(logits, settings), settings, positions)

    return lax.cond(settings.random.any(), drawn, lambda: most_likely(logits))


def most_likely(scores: jax.Array) -> jax.Array:
    """Index of the first largest score: ...V -> ... int32; V where that is not finite.

    Otherwise it equals `argmax`, which XLA does not vectorise on CPUs; these two passes take a
    seventh of its time (measured).
    """
    number = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    top = scores.max(-1, keepdims=True)  # NaN if any score is
    largest = scores == jnp.where(jnp.isfinite(top), top, jnp.nan)
    return jnp.where(largest, number, scores.shape[-1]).min(-1)
