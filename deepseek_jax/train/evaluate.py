"""Loss of given weights on given sequences, without gradients."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import Config
from deepseek_jax.model import execution, params
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.axes import DATA_AXES, Layout
from deepseek_jax.train.loss import head_loss
from deepseek_jax.train.state import split


@dataclasses.dataclass(frozen=True)
class Score:
    """Attributes:
    nats: summed cross entropy of the main head.
    targets: how many tokens were predicted.
    """

    nats: float
    targets: int

    def bits_per_byte(self, text_bytes: int) -> float:
        return self.nats / math.log(2) / text_bytes


def make_score(
    config: Config, layout: Layout, mesh: Mesh
) -> Callable[[nnx.State, nnx.State, np.ndarray, np.ndarray], Score]:
    """Returns score(masters, biases, sequences N(S+1), valid NS); the caller holds the mesh.

    N is walked in micro-batches of the training size, the last one padded.
    """
    graph, abstract, abstract_bias = split(abstract_model(config.model))
    stored = params.place(abstract, layout.storage)
    how = dataclasses.replace(execution.of(config), recompute="none", flights=1)
    per_layer = config.layout.zero == 3
    batch_spec = P(layout.mesh_axes("batch") or None, None)
    data_axes = tuple(name for name in DATA_AXES if layout.sizes[name] > 1)

    def local(masters, bias, tokens, valid):
        with axes.active(layout):
            compute = params.cast(masters, how.recipe.compute)
            compute = compute if per_layer else params.gather(compute, layout)
            model: Any = nnx.merge(graph, compute, bias)
            rows = model.trunk(tokens[:, :-1], how).top.reshape(-1, config.model.d_model)
            counted = valid.reshape(-1).astype(jnp.float32)
            chunk = min(config.layout.loss_chunk, rows.shape[0])
            head = params.whole(model.head).table[...]
            nats, _ = head_loss(rows, head, tokens[:, 1:].reshape(-1), counted, chunk)
            return lax.psum(nats, data_axes) if data_axes else nats

    total = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(stored, jax.tree.map(lambda _: P(), abstract_bias), batch_spec, batch_spec),
            out_specs=P(),
            check_vma=False,
        )
    )

    def score(masters, bias, sequences, valid):
        size, nats = config.batch.micro_sequences, 0.0
        place = NamedSharding(mesh, batch_spec)
        for start in range(0, len(sequences), size):
            parts = sequences[start : start + size], valid[start : start + size]
            short = size - len(parts[0])
            padded = [np.pad(part, ((0, short), (0, 0))) for part in parts]
            nats += float(total(masters, bias, *(spread(part, place) for part in padded)))
        return Score(nats, int(valid.sum()))

    return score


def spread(value: np.ndarray, place: NamedSharding) -> jax.Array:
    """An array that every process holds whole -> one global array."""
    return jax.make_array_from_callback(value.shape, place, lambda index: value[index])
