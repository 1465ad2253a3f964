"""Training steps over the first few of the eight devices, as the training loop takes them."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import small
from jax.sharding import NamedSharding

from deepseek_jax.config import MESH_AXES, Config, ModelConfig, OptimizerConfig
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.train import optimizer, token_schedule
from deepseek_jax.train import state as states
from deepseek_jax.train.step import make_step, tokens_spec


class Trainer:
    """A state and its compiled step; `step` updates the state and returns the metrics."""

    def __init__(self, config: Config):
        self.config, self.layout = config, meshes.layout(config)
        self.mesh = small.mesh_of({name: getattr(config.mesh, name) for name in MESH_AXES})
        adam = optimizer.build(config.optimizer)
        with jax.set_mesh(self.mesh):
            places = states.shardings(config, self.layout, self.mesh, adam)
            self.state = jax.device_put(fresh(config.model, config.optimizer, config.seed), places)
            self._step = jax.jit(make_step(config, self.layout, self.mesh, adam), donate_argnums=0)

    def step(
        self, tokens: np.ndarray, count: int, hyper: token_schedule.Hyper, *limits: Any
    ) -> dict[str, Any]:
        """tokens: micro-batch, sequence, position + 1; the first `count` micro-batches count."""
        with jax.set_mesh(self.mesh):
            placed = jax.device_put(tokens, NamedSharding(self.mesh, tokens_spec(self.layout)))
            told = jax.tree.map(np.float32, hyper)
            self.state, metrics = self._step(self.state, placed, np.int32(count), told, *limits)
            return jax.device_get(metrics)

    def run(self, steps: int) -> list[dict[str, Any]]:
        """Steps under the config's own schedule, on tokens drawn from the step's number."""
        batch, out, tokens = self.config.batch, [], 0
        for number in range(steps):
            drawn = np.random.default_rng(number).integers(
                0,
                self.config.model.vocab,
                (token_schedule.most_micro_batches(batch), batch.micro_sequences, batch.length + 1),
                np.int32,
            )
            count = token_schedule.micro_batches(batch, tokens)
            hyper = token_schedule.hyper(self.config.schedule, step=number, tokens=tokens)
            out.append(self.step(drawn, count, hyper))
            tokens += count * token_schedule.tokens_per_micro_batch(batch)
        return out

    def params(self) -> Any:
        return jax.device_get(self.state.params)


@functools.cache
def fresh(model: ModelConfig, optimizer_config: OptimizerConfig, seed: int) -> states.TrainState:
    """State of `initialise`, on the host. Compiling it for every layout takes long;
    another test checks that it is the same on every layout."""
    config = small.config()
    config = dataclasses.replace(config, model=model, optimizer=optimizer_config, seed=seed)
    return jax.device_get(initial(config))


def initial(config: Config) -> states.TrainState:
    """State of `initialise` for this config on its own mesh."""
    layout = meshes.layout(config)
    mesh = small.mesh_of({name: getattr(config.mesh, name) for name in MESH_AXES})
    adam = optimizer.build(config.optimizer)
    with jax.set_mesh(mesh):
        places = states.shardings(config, layout, mesh, adam)
        return states.initialise(config, places, adam)


def with_schedule(config: Config, **values: Any) -> Config:
    return dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, **values))
