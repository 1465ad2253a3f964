"""The latent cache: all that decoding keeps of a token is one latent and one rotated key per layer.

576 numbers of V3 in a layer, 70,272 bytes of a token in bfloat16. In FP8 the latent travels as E4M3
in tiles of 1x128 with float32 scales, and the key, which positions turn, stays bfloat16: 656 bytes
in a layer, 40,016 in all.

L layers, B requests, T positions, C latent width, R rotary width, S positions written at once.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.model.decoding import PerStack
from deepseek_jax.model.mla import Kept
from deepseek_jax.precision.payload import FP8_PAYLOAD, UNCHANGED_PAYLOAD, Payload

FORMATS = ("float32", "bfloat16", "fp8")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latents:
    """What a stack of layers keeps.

    Attributes:
      latent: LBT..., normalised latents as `payload` encodes them.
      key_rope: LBTR, rotated keys.
    """

    latent: tuple[jax.Array, ...]
    key_rope: jax.Array
    payload: Payload = dataclasses.field(metadata=dict(static=True))

    def write(self, layer: Any, positions: jax.Array, kept: Kept) -> "Latents":
        """BSC and BSR of one layer to positions BS; those from T on have no room and are left."""
        latent, key_rope = kept
        request = jnp.arange(positions.shape[0])[:, None]

        def put(whole, new):
            place = whole.at[layer, request, positions]
            return place.set(new.astype(whole.dtype), mode="drop", unique_indices=True)

        encoded = self.payload.encode(latent)
        return dataclasses.replace(
            self,
            latent=jax.tree.map(put, self.latent, encoded),
            key_rope=put(self.key_rope, key_rope),
        )

    def read(self, layer: Any, dtype: Any) -> Kept:
        """BTC and BTR of one layer."""
        encoded = jax.tree.map(lambda whole: whole[layer], self.latent)
        latent = self.payload.decode(encoded, dtype).astype(dtype)
        return latent, self.key_rope[layer].astype(dtype)

    def admit(self, requests: jax.Array, kept: Kept) -> "Latents":
        """The first positions of some requests: LNSC and LNSR to rows N, those from B on nowhere.

        What the rows held before stays behind these, where nothing looks until it is written over.
        """
        latent, key_rope = kept
        length = key_rope.shape[2]

        def put(whole, new):
            return whole.at[:, requests, :length].set(new.astype(whole.dtype), mode="drop")

        return dataclasses.replace(
            self,
            latent=jax.tree.map(put, self.latent, self.payload.encode(latent)),
            key_rope=put(self.key_rope, key_rope),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCaches:
    """`Latents` of a stack whose layers are compiled one after another.

    To read a layer of `Latents` copies it out; one that is an array of its own is read in place.

    Attributes:
      layers: each a stack of one.
    """

    layers: tuple[Latents, ...]

    def write(self, layer: int, positions: jax.Array, kept: Kept) -> "LayerCaches":
        own = self.layers[layer].write(0, positions, kept)
        return LayerCaches((*self.layers[:layer], own, *self.layers[layer + 1 :]))

    def read(self, layer: int, dtype: Any) -> Kept:
        return self.layers[layer].read(0, dtype)

    def admit(self, requests: jax.Array, kept: Kept) -> "LayerCaches":
        latent, key_rope = kept
        return LayerCaches(
            tuple(
                own.admit(requests, (latent[i : i + 1], key_rope[i : i + 1]))
                for i, own in enumerate(self.layers)
            )
        )


def make(
    config: ModelConfig, requests: int, length: int, form: str, *, mtp: bool, apart: bool = False
) -> PerStack:
    """An empty cache for some requests of up to `length` tokens.

    Args:
      form: one of FORMATS.
      mtp: whether the MTP modules have one too.
      apart: whether each layer's is an array of its own.
    """
    if form not in FORMATS:
        raise ConfigError(f"--cache={form}; expected one of {', '.join(FORMATS)}")
    payload = FP8_PAYLOAD if form == "fp8" else UNCHANGED_PAYLOAD
    dtype = jnp.bfloat16 if form == "fp8" else jnp.dtype(form)

    def stack(layers: int) -> Latents | LayerCaches | None:
        if not layers:
            return None
        if apart:
            return LayerCaches(tuple(latents(1) for _ in range(layers)))
        return latents(layers)

    def latents(layers: int) -> Latents:
        shape = (layers, requests, length)
        latent = payload.encode(jnp.zeros((*shape, config.kv_latent), dtype))
        return Latents(latent, jnp.zeros((*shape, config.d_rope), dtype), payload)

    modules = config.mtp_depth if mtp else 0
    return PerStack(stack(config.dense_layers), stack(config.moe_layers), stack(modules))


def bytes_per_token(config: ModelConfig, form: str, *, mtp: bool = False) -> int:
    """Over all layers, from the arrays themselves: nothing is allocated."""
    whole = jax.eval_shape(lambda: make(config, 1, 1, form, mtp=mtp))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(whole))
