"""Device state of the engine: text, latent caches and sampling settings of its request slots.

B request slots of this device, each with one request or none; T tokens of room in each; W window of
the MTP modules, D model width; N new requests, S padded prompt length.
"""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.decoding import PerStack
from deepseek_jax.serve import latent_cache as caches
from deepseek_jax.serve.sampling import Settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Request slots of a batch.

    Attributes:
      text: BT int32, tokens of prompt and generation.
      length: B int32, number of tokens in `text`; all but the last are in the cache.
      limit: B int32, largest length; at most `length` once the request has ended.
      settings: Sampling settings of each request.
    """

    text: jax.Array
    length: jax.Array
    limit: jax.Array
    settings: Settings

    @property
    def running(self) -> jax.Array:
        """B bool, True for a slot whose request has not ended."""
        return self.length < self.limit

    @property
    def last(self) -> jax.Array:
        """B int32, position of the last token; 0 in an empty slot."""
        return jnp.maximum(self.length - 1, 0)

    def at(self, positions: jax.Array) -> jax.Array:
        """Tokens BS at positions BS; arbitrary for positions outside [0, T)."""
        inside = jnp.clip(positions, 0, self.text.shape[1] - 1)
        return jnp.take_along_axis(self.text, inside, axis=1)

    def with_drafts(self, positions: jax.Array, tokens: jax.Array) -> "Slots":
        """Slots with draft tokens B written at positions B and unchanged length."""
        request = jnp.arange(tokens.shape[0])
        text = self.text.at[request, positions].set(tokens, mode="drop")
        return dataclasses.replace(self, text=text)

    def extended(
        self, tokens: jax.Array, count: jax.Array, stop: tuple[int, ...]
    ) -> tuple["Slots", jax.Array]:
        """Appends the first `count` B of tokens BS, cut after a stop token and at the limit.

        Returns:
          The slots, and the number of tokens B appended to each, 0 for a slot that does not run.
        """
        order = jnp.arange(tokens.shape[1])[None]
        count = jnp.clip(self.limit - self.length, 0, count)
        ends = _is_one_of(tokens, stop) & (order < count[:, None])
        ended = ends.any(1)
        count = jnp.where(ended, ends.argmax(1).astype(count.dtype) + 1, count)
        nowhere = self.text.shape[1]
        positions = jnp.where(order < count[:, None], self.length[:, None] + order, nowhere)
        request = jnp.arange(tokens.shape[0])[:, None]
        length = self.length + count
        longer = dataclasses.replace(
            self,
            text=self.text.at[request, positions].set(tokens, mode="drop"),
            length=length,
            limit=jnp.where(ended, length, self.limit),
        )
        return longer, count


def _is_one_of(tokens: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    """True at every token that is a stop token."""
    found = jnp.zeros(tokens.shape, jnp.bool_)
    for token in stop:
        found |= tokens == token
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """State of the engine on one device.

    Attributes:
      slots: Request slots.
      cache: `Latents` or `LayerCaches` of each stack of layers.
      hidden_window: BWD, output of the main model after its final norm at the W positions before
        each request's last token, which the MTP modules read; W is 0 without speculation.
    """

    slots: Slots
    cache: PerStack
    hidden_window: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Admission:
    """New requests for free request slots.

    Attributes:
      rows: N int32, slot of each request; an entry of B or more is no request.
      prompts: NS int32, padded at the end.
      lengths: N int32, tokens of each prompt.
      limits: N int32, as in `Slots`.
      settings: Sampling settings, as in `Slots`.
    """

    rows: jax.Array
    prompts: jax.Array
    lengths: jax.Array
    limits: jax.Array
    settings: Settings

    def into(self, slots: Slots) -> Slots:
        """Slots with these requests written into them."""

        def put(whole, new):
            return whole.at[self.rows].set(new, mode="drop")

        length = self.prompts.shape[1]
        return Slots(
            text=slots.text.at[self.rows, :length].set(self.prompts, mode="drop"),
            length=put(slots.length, self.lengths),
            limit=put(slots.limit, self.limits),
            settings=jax.tree.map(put, slots.settings, self.settings),
        )


def empty(
    config: ModelConfig,
    requests: int,
    length: int,
    form: str,
    dtype: jnp.dtype,
    window: int,
    per_layer: bool,
) -> State:
    """State without a request.

    Args:
      config: Sizes of the model.
      requests: B, request slots.
      length: T, tokens of room in each slot.
      form: Format of the latent cache, one of `latent_cache.FORMATS`.
      dtype: Type of activations.
      window: W; 0 without speculation.
      per_layer: True makes the cache of each layer an array of its own.
    """
    integers = jnp.zeros((requests,), jnp.int32)
    numbers = jnp.zeros((requests,), jnp.float32)
    settings = Settings(numbers, numbers + 1.0, jnp.zeros((requests,), jnp.uint32))
    slots = Slots(jnp.zeros((requests, length), jnp.int32), integers, integers, settings)
    hidden_window = jnp.zeros((requests, window, config.d_model), dtype)
    cache = caches.make(config, requests, length, form, mtp=window > 0, per_layer=per_layer)
    return State(slots, cache, hidden_window)
