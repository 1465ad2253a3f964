"""Decoding with V3.2's indexer beside attention to all positions, as the context grows.

Attention of one layer decodes one token over a full cache, in float32, on the device that JAX has:
once with an indexer, which scores all cached keys and gathers 2,048 latents, and once without. Both
have V3's latent (512 + 64); heads and heads of the indexer are an eighth of V3.2's. The two run in
turns, and medians are compared.

For V3.2 itself the work of a token is counted: multiply-adds as two operations, and the cache in
bfloat16. `of_token` adds the operations of all weights that a token uses.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.bench.v3_sizes import MODEL
from deepseek_jax.config import Config, ModelConfig
from deepseek_jax.model.count import count
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.mla import LatentAttention
from deepseek_jax.serve import latent_cache

LENGTHS = (2048, 8192, 32_768, 131_072)
BFLOAT16 = 2  # bytes
CALLS = 4  # in a row, between two looks at the clock
INDEXER: dict[str, Any] = dict(
    index_heads=64, index_width=128, index_top_k=2048
)  # V3.2-Exp's config.json
SMALL: dict[str, Any] = dict(
    d_model=256, heads=16, q_latent=192, kv_latent=512, d_nope=128, d_rope=64, d_value=128,
    index_heads=8, index_width=128, index_top_k=2048, layers=1, dense_layers=0, mtp_depth=0,
)  # fmt: skip


def measure(
    config: Config, *, lengths: tuple[int, ...] = LENGTHS, rounds: int = 7, **changes: Any
) -> dict[str, Any]:
    """Measures the table `attention`, and counts the table `v3_2`.

    Args:
      config: of the run; its own sizes are not used.
      lengths: lengths of the cache.
      rounds: runs of each, in turns; medians are reported, as the machine may be shared.
      changes: of the sizes of the model that is timed.
    """
    small = dataclasses.replace(config.model, **(SMALL | changes))
    published = MODEL | INDEXER | {"layers": 61, "dense_layers": 3, "mtp_depth": 0}
    v3_2 = dataclasses.replace(config.model, **published)
    return {
        "attention": [_row(small, length, rounds) for length in lengths],
        "v3_2": [counted(v3_2, length) for length in lengths],
    }


def counted(model: ModelConfig, length: int) -> dict[str, Any]:
    """Operations and cache bytes of decoding one token over a cache of `length`, all layers."""
    width = model.heads * (2 * model.kv_latent + model.d_rope)  # scores, and the mean of latents
    cached = model.kv_latent + model.d_rope
    attended = min(length, model.index_top_k)
    scored = length if length > model.index_top_k else 0
    index = model.index_heads * model.index_width
    weights = 2 * (count(model).activated - count(model).input_table)
    dense = 2 * model.layers * length * width
    sparse = 2 * model.layers * (attended * width + scored * index)
    dense_bytes = BFLOAT16 * model.layers * length * cached
    sparse_bytes = BFLOAT16 * model.layers * (attended * cached + scored * model.index_width)
    return {
        "cache_length": length,
        "dense_gflop": dense / 1e9,
        "sparse_gflop": sparse / 1e9,
        "sparse_of_dense": sparse / dense,
        "sparse_of_dense_bytes": sparse_bytes / dense_bytes,
        "sparse_of_dense_of_token": (weights + sparse) / (weights + dense),
    }


def _row(model: ModelConfig, length: int, rounds: int) -> dict[str, Any]:
    """Row of table `attention`."""
    dense = dataclasses.replace(model, index_heads=0)
    both = _Decoding(dense, length), _Decoding(model, length)
    seconds = np.array([[one.run() for one in both] for _ in range(rounds)])
    without, own = map(float, np.median(seconds, axis=0))
    return {
        "cache_length": length,
        "dense_ms": 1e3 * without,
        "sparse_ms": 1e3 * own,
        "sparse_of_dense": own / without,
    }


class _Decoding:
    """Compiled decoding of one token at the last position of a cache that it updates in place."""

    def __init__(self, model: ModelConfig, length: int):
        """Fills a cache of `length` positions with random numbers, and compiles."""
        attention = LatentAttention(model, rngs=nnx.Rngs(params=0))
        self._x = jax.random.normal(jax.random.key(1), (1, 1, model.d_model))
        position = jnp.full((1, 1), length - 1)

        @jax.jit
        def filled() -> Any:
            empty = latent_cache.make(model, 1, length, "float32", mtp=False).moe
            leaves, tree = jax.tree.flatten(empty)
            keys = jax.random.split(jax.random.key(2), len(leaves))
            pairs = zip(keys, leaves, strict=True)
            return jax.tree.unflatten(tree, [jax.random.normal(k, x.shape) for k, x in pairs])

        def decode(attention: LatentAttention, past: Any, x: jax.Array) -> Any:
            return attention.decode(x, Execution(), past, 0, position)

        self._past = filled()
        self._step = functools.partial(jax.jit(decode, donate_argnums=1), attention)
        self.run()

    def run(self) -> float:
        """Mean seconds of a call."""
        begin = time.perf_counter()
        for _ in range(CALLS):
            out, self._past = self._step(self._past, self._x)
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / CALLS
