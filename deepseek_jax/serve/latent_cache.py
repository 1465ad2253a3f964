"""Latent cache of MLA: one latent (c^KV) and one rotated key (k^R) per token and layer.

V3 caches 576 elements per token and layer: 70,272 bytes per token over all layers in the format
"bfloat16". The format "fp8" keeps the latent as E4M3 in tiles of 1x128 with power-of-two scales,
a byte each, and the rotated key in bfloat16: 644 bytes per token and layer, 39,284 over all layers.
V3.2 caches a key of its indexer besides, in the form of a latent: 128 elements per token and layer.

L layers, B requests, T positions, C latent width, R rotary width, I width of an index key,
S positions written at once, N requests admitted at once, K positions that a query chooses.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.model.decoding import PerStack
from deepseek_jax.model.mla import Kept
from deepseek_jax.precision.payload import FP8_PAYLOAD, UNCHANGED_PAYLOAD, Payload
from deepseek_jax.precision.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """Numbers of a cache in memory.

    Attributes:
      dtype: of rotated keys, and of latents where `payload` leaves them as they are.
      payload: encoding of the latents.
    """

    dtype: jnp.dtype
    payload: Payload


FORMATS = {
    "float32": CacheFormat(jnp.dtype(jnp.float32), UNCHANGED_PAYLOAD),
    "bfloat16": CacheFormat(jnp.dtype(jnp.bfloat16), UNCHANGED_PAYLOAD),
    "fp8": CacheFormat(jnp.dtype(jnp.bfloat16), FP8_PAYLOAD),
}


def default_format(recipe: Recipe) -> str:
    """Name of the format that keeps activations as they are, whatever the recipe is called."""
    unchanged = CacheFormat(recipe.activation_dtype, UNCHANGED_PAYLOAD)
    return next(name for name, found in FORMATS.items() if found == unchanged)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latents:
    """Cache of a stack of layers.

    Attributes:
      latent: LBT..., normalised latents as `payload` encodes them.
      key_rope: LBTR, rotated keys.
      payload: Encoding of the latents and of the indexer's keys.
      index_key: LBT..., keys of the indexer as `payload` encodes them; empty without an indexer.
    """

    latent: tuple[jax.Array, ...]
    key_rope: jax.Array
    payload: Payload = dataclasses.field(metadata=dict(static=True))
    index_key: tuple[jax.Array, ...] = ()

    @property
    def length(self) -> int:
        """Positions T of a request."""
        return self.key_rope.shape[2]

    def write(self, layer: Any, positions: jax.Array, kept: Kept) -> "Latents":
        """Writes one layer's BSC, BSR and BSI at positions BS; positions of T or more are dropped.

        Without an indexer there is no BSI.
        """
        if positions.size == 1:
            # XLA makes a scatter of one row an update of the array, which its fusions do twice and
            # not in place: with copies of the whole cache. So a second row comes, and is dropped.
            positions = jnp.pad(positions, ((0, 0), (0, 1)), constant_values=self.length)
            kept = tuple(jnp.pad(new, ((0, 0), (0, 1), (0, 0))) for new in kept)
        latent, key_rope, *index_key = kept
        request = jnp.arange(positions.shape[0])[:, None]

        def put(whole: jax.Array, new: jax.Array) -> jax.Array:
            place = whole.at[layer, request, positions]
            return place.set(new.astype(whole.dtype), mode="drop", unique_indices=True)

        return self._with(put, latent, key_rope, index_key)

    def _with(
        self,
        put: Callable[[jax.Array, jax.Array], jax.Array],
        latent: jax.Array,
        key_rope: jax.Array,
        index_key: Sequence[jax.Array],
    ) -> "Latents":
        """The cache with put(array, new values) in place of each array."""
        encoded = tuple(part for key in index_key for part in self.payload.encode(key))
        return dataclasses.replace(
            self,
            latent=jax.tree.map(put, self.latent, self.payload.encode(latent)),
            key_rope=put(self.key_rope, key_rope),
            index_key=jax.tree.map(put, self.index_key, encoded),
        )

    def read(self, layer: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Latents BTC and rotated keys BTR of one layer, in `dtype`."""
        return self._decoded(self.latent, layer, dtype), self.key_rope[layer].astype(dtype)

    def read_index(self, layer: Any, dtype: Any) -> jax.Array:
        """Keys BTI of one layer's indexer, in `dtype`."""
        return self._decoded(self.index_key, layer, dtype)

    def gather(self, layer: Any, chosen: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Latents BSKC and rotated keys BSKR of one layer at positions BSK, in `dtype`."""
        request = jnp.arange(chosen.shape[0])[:, None, None]
        where = layer, request, chosen
        return self._decoded(self.latent, where, dtype), self.key_rope[where].astype(dtype)

    def _decoded(self, encoded: tuple[jax.Array, ...], where: Any, dtype: Any) -> jax.Array:
        parts = tuple(whole[where] for whole in encoded)
        return self.payload.decode(parts, dtype).astype(dtype)

    def admit(self, requests: jax.Array, kept: Kept) -> "Latents":
        """Writes the first S positions of new requests: LNSC, LNSR and LNSI to rows N.

        Rows of B or more are dropped. Later positions keep the entries of an earlier request; no
        query reads them before they are overwritten.
        """
        latent, key_rope, *index_key = kept
        length = key_rope.shape[2]

        def put(whole: jax.Array, new: jax.Array) -> jax.Array:
            return whole.at[:, requests, :length].set(new.astype(whole.dtype), mode="drop")

        return self._with(put, latent, key_rope, index_key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCaches:
    """Cache of a stack whose layers are compiled one after another.

    Reading a layer of a stacked `Latents` copies it; an array per layer is read in place.

    Attributes:
      layers: Caches of the layers, each a stack of one.
    """

    layers: tuple[Latents, ...]

    @property
    def length(self) -> int:
        """Positions T of a request."""
        return self.layers[0].length

    def write(self, layer: int, positions: jax.Array, kept: Kept) -> "LayerCaches":
        """`Latents.write` of one layer."""
        own = self.layers[layer].write(0, positions, kept)
        return LayerCaches((*self.layers[:layer], own, *self.layers[layer + 1 :]))

    def read(self, layer: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """`Latents.read` of one layer."""
        return self.layers[layer].read(0, dtype)

    def read_index(self, layer: int, dtype: Any) -> jax.Array:
        """`Latents.read_index` of one layer."""
        return self.layers[layer].read_index(0, dtype)

    def gather(self, layer: int, chosen: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """`Latents.gather` of one layer."""
        return self.layers[layer].gather(0, chosen, dtype)

    def admit(self, requests: jax.Array, kept: Kept) -> "LayerCaches":
        """`Latents.admit` of all layers."""
        return LayerCaches(
            tuple(
                own.admit(requests, tuple(part[i : i + 1] for part in kept))
                for i, own in enumerate(self.layers)
            )
        )


def make(
    config: ModelConfig,
    requests: int,
    length: int,
    form: str,
    *,
    mtp: bool,
    per_layer: bool = False,
) -> PerStack:
    """Builds an empty cache.

    Args:
      config: Sizes of the model.
      requests: B.
      length: T, tokens of room for each request.
      form: Format, one of FORMATS.
      mtp: True adds a cache for the MTP modules.
      per_layer: True makes the cache of each layer an array of its own.

    Raises:
      ConfigError: An unknown format.
    """
    if form not in FORMATS:
        raise ConfigError(f"engine.cache={form}; expected one of {', '.join(FORMATS)}")
    dtype, payload = FORMATS[form].dtype, FORMATS[form].payload

    def stack(layers: int) -> Latents | LayerCaches | None:
        if not layers:
            return None
        if per_layer:
            return LayerCaches(tuple(latents(1) for _ in range(layers)))
        return latents(layers)

    def latents(layers: int) -> Latents:
        shape = (layers, requests, length)
        latent = payload.encode(jnp.zeros((*shape, config.kv_latent), dtype))
        key_rope = jnp.zeros((*shape, config.d_rope), dtype)
        if not config.index_heads:
            return Latents(latent, key_rope, payload)
        index_key = payload.encode(jnp.zeros((*shape, config.index_width), dtype))
        return Latents(latent, key_rope, payload, index_key)

    modules = config.mtp_depth if mtp else 0
    return PerStack(stack(config.dense_layers), stack(config.moe_layers), stack(modules))


def bytes_per_token(config: ModelConfig, form: str, *, mtp: bool = False) -> int:
    """Cache bytes of one token over all layers, from the shapes of the arrays."""
    whole = jax.eval_shape(lambda: make(config, 1, 1, form, mtp=mtp))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(whole))
