"""A training step, lowered for devices that need not be there."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import Config
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.train import optimizer, schedule, state
from deepseek_jax.train.step import make_step, tokens_spec


def lower(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """A training step, its state donated; the average, which is in host memory, left out.

    Args:
      mesh: real or virtual (`cluster.mesh`), of the sizes of `config.mesh`.
    """
    without = dataclasses.replace(config.optimizer, ema_decay=0.0)
    config = dataclasses.replace(config, optimizer=without)
    layout, adam = meshes.layout(config), optimizer.build(config.optimizer)
    places = state.shardings(config, layout, mesh, adam)
    whole, batch = NamedSharding(mesh, P()), config.batch

    def number(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((), dtype, sharding=whole)

    tokens = jax.ShapeDtypeStruct(
        (schedule.most_micro_batches(batch), batch.micro_sequences, batch.length + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, tokens_spec(layout)),
    )
    hyper = schedule.Hyper(*(number(jnp.float32) for _ in dataclasses.fields(schedule.Hyper)))
    step = jax.jit(make_step(config, layout, mesh, adam), donate_argnums=0)
    start = state.abstract(config, places, adam)  # not under the mesh: it makes a random key
    with jax.set_mesh(mesh):
        return step.lower(start, tokens, number(jnp.int32), hyper)
