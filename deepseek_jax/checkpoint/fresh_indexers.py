"""Random lightning indexers for the weights of V3: how V3.2 began (DeepSeek-V3.2-Exp, section 2.1).

A Hugging Face directory without indexers becomes a workdir with them where the training recipe has
`model.index_heads`. The numbers depend on the parameter and its layer alone, so that any part of a
parameter can be made by itself.
"""

import zlib
from collections.abc import Callable

import numpy as np

from deepseek_jax.checkpoint.hf.parts import Slices
from deepseek_jax.model.params import Weight

Read = Callable[[Weight, Slices], np.ndarray]


def is_of_indexer(weight: Weight) -> bool:
    """Whether a parameter belongs to an indexer."""
    return ".attention.indexer." in weight.path


def reading(read: Read, init_std: float) -> Read:
    """`read` with new values for the indexers: a norm that changes nothing, and normal weights.

    Args:
      read: gives the part `held` of any other parameter.
      init_std: standard deviation of the weights.
    """

    def part(weight: Weight, held: Slices) -> np.ndarray:
        if not is_of_indexer(weight):
            return read(weight, held)
        layers, inside = held[0], held[1:]
        rows = [
            _layer(weight, number, init_std)[inside] for number in range(layers.start, layers.stop)
        ]
        return np.stack(rows).astype(weight.dtype)

    return part


def _layer(weight: Weight, number: int, init_std: float) -> np.ndarray:
    """Values of one layer of a parameter of an indexer, float32."""
    shape = weight.shape[1:]
    if weight.path.endswith((".scale", ".bias")):
        return np.full(shape, weight.path.endswith(".scale"), np.float32)
    random = np.random.default_rng((zlib.crc32(weight.path.encode()), number))
    return np.float32(init_std) * random.standard_normal(shape, np.float32)
