"""What lives on the devices while requests are served: their text, their caches, their settings.

B slots of this device, each holding one request or none; T tokens of room in each.
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
    """The requests of a batch.

    Attributes:
      text: BT int32, prompt and what was generated.
      length: B int32, how much of it there is; all but its last token are in the cache.
      limit: B int32, where it ends at the latest; no more than `length` once it has ended.
      settings: how each chooses its tokens.
    """

    text: jax.Array
    length: jax.Array
    limit: jax.Array
    settings: Settings

    @property
    def running(self) -> jax.Array:
        return self.length < self.limit

    @property
    def last(self) -> jax.Array:
        """B, the position of the last token; 0 in an empty slot."""
        return jnp.maximum(self.length - 1, 0)

    def at(self, positions: jax.Array) -> jax.Array:
        """Tokens at positions BS; past either end, any."""
        inside = jnp.clip(positions, 0, self.text.shape[1] - 1)
        return jnp.take_along_axis(self.text, inside, axis=1)

    def guessing(self, positions: jax.Array, tokens: jax.Array) -> "Slots":
        """With tokens B written at positions B, and as long as before."""
        request = jnp.arange(tokens.shape[0])
        text = self.text.at[request, positions].set(tokens, mode="drop")
        return dataclasses.replace(self, text=text)

    def extended(
        self, tokens: jax.Array, count: jax.Array, stop: tuple[int, ...]
    ) -> tuple["Slots", jax.Array]:
        """With the first `count` B of tokens BS, cut after a stop token and at the limit.

        Returns:
          The slots, and how many tokens B they really got: none where nothing runs.
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
    found = jnp.zeros(tokens.shape, jnp.bool_)
    for token in stop:
        found |= tokens == token
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Attributes:
    slots: the requests.
    cache: `Latents`, or `LayerCaches`, of each stack of layers.
    hidden_window: BWD, what the MTP modules read of the W positions before each request's last
      token: the main model's output after its final norm. W is 0 where nothing is drafted.
    """

    slots: Slots
    cache: PerStack
    hidden_window: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Admission:
    """Requests N that are to start.

    Attributes:
      rows: N int32, the slot of each; those from B on are none.
      prompts: NS int32, padded at the end.
      lengths, limits, settings: as in `Slots`.
    """

    rows: jax.Array
    prompts: jax.Array
    lengths: jax.Array
    limits: jax.Array
    settings: Settings

    def into(self, slots: Slots) -> Slots:
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
    apart: bool,
) -> State:
    """No request in any slot.

    Args:
      form: of the cache.
      dtype: of activations.
      window: W; 0 where nothing is drafted.
      apart: whether each layer's cache is an array of its own.
    """
    integers = jnp.zeros((requests,), jnp.int32)
    numbers = jnp.zeros((requests,), jnp.float32)
    settings = Settings(numbers, numbers + 1.0, jnp.zeros((requests,), jnp.uint32))
    slots = Slots(jnp.zeros((requests, length), jnp.int32), integers, integers, settings)
    hidden_window = jnp.zeros((requests, window, config.d_model), dtype)
    cache = caches.make(config, requests, length, form, mtp=window > 0, apart=apart)
    return State(slots, cache, hidden_window)
