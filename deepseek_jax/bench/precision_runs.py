"""Training runs of `bench precision`: one compiled step for each recipe, one run for each seed."""

import contextlib
import dataclasses
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from deepseek_jax.config import Config
from deepseek_jax.data import files, scoring
from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.loader import TrainData
from deepseek_jax.errors import RunError
from deepseek_jax.hardware import xla_options
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.precision.recipes import Recipe
from deepseek_jax.train import batches, evaluation, optimizer, state, token_schedule
from deepseek_jax.train.step import make_step, tokens_spec

EVERY = 10  # steps whose mean loss is kept as one number
_PERTURBATION = 7919  # folded into a run's seed for the key of its perturbation


class Trainer:
    """Runs of one recipe, which share a compiled step and a compiled score."""

    def __init__(self, config: Config, corpus: Corpus, recipe: Recipe | None = None):
        """Compiles nothing yet.

        Args:
          config: of all runs, but for the seed; it trains on one device.
          corpus: its text.
          recipe: in place of the config's; None for the config's.
        """
        self._config, self._corpus = config, corpus
        self._mesh, self._layout = meshes.build(config.mesh), meshes.layout(config)
        self._adam = optimizer.build(config.optimizer)
        self._places = state.shardings(config, self._layout, self._mesh, self._adam)
        self._tokens_place = NamedSharding(self._mesh, tokens_spec(self._layout))
        step = make_step(config, self._layout, self._mesh, self._adam, recipe)
        self._step = jax.jit(
            step, donate_argnums=0, out_shardings=(self._places, None),
            compiler_options=xla_options.options(jax.default_backend()),
        )  # fmt: skip
        self._score = evaluation.make_score(config, self._layout, self._mesh, recipe)
        self._held_out = scoring.held_out(
            corpus, length=config.batch.length, tokens=config.evaluation.tokens
        )

    def train(
        self,
        seed: int,
        *,
        start: Path | None = None,
        perturbation: float = 0.0,
        save: Path | None = None,
        tick: Callable[[int], None] = lambda step: None,
    ) -> dict[str, Any]:
        """Trains one run to its end and scores it on held-out text.

        Args:
          seed: of fresh weights, and of the order of the data.
          start: file of weights to begin with, as `save` wrote it; None begins with fresh ones.
          perturbation: relative size of the normal noise on each initial weight; 0 for none.
          save: file for the final weights and biases; None for none.
          tick: receives the number of steps taken, after each step.

        Returns:
          loss and mtp_loss: means of each `EVERY` steps, in nats per token; held_out_loss; steps;
          seconds.

        Raises:
          RunError: a loss or a gradient norm that is no number.
        """
        config, begin = dataclasses.replace(self._config, seed=seed), time.perf_counter()
        losses: list[list[float]] = []
        data = TrainData(
            config.data,
            vocab=config.model.vocab,
            length=config.batch.length,
            micro_sequences=config.batch.micro_sequences,
            seed=seed,
            corpus=self._corpus,
        )
        with contextlib.closing(data), jax.set_mesh(self._mesh):
            now = self._begin(config, start)
            if perturbation:
                key = jax.random.fold_in(jax.random.key(seed), _PERTURBATION)
                now = dataclasses.replace(now, params=perturbed(now.params, key, perturbation))
            tokens = 0
            while tokens < config.schedule.tokens:
                count = token_schedule.micro_batches(config.batch, tokens)
                batch = batches.take(data, config, self._tokens_place, count)
                hyper = token_schedule.hyper(config.schedule, step=len(losses), tokens=tokens)
                numbers = jax.tree.map(np.float32, hyper)
                now, metrics = self._step(now, batch, np.int32(count), numbers)
                losses.append(_checked(metrics, len(losses) + 1))
                tokens += count * token_schedule.tokens_per_micro_batch(config.batch)
                tick(len(losses))
            held = self._held_out
            scored = self._score(now.params, now.bias, held.sequences, held.valid)
            if save is not None:
                _save(save, now)
        loss, mtp_loss = means(np.array(losses).T)
        return {
            "steps": len(losses),
            "loss": loss,
            "mtp_loss": mtp_loss,
            "held_out_loss": scored.nats / scored.targets,
            "seconds": round(time.perf_counter() - begin, 1),
        }

    def _begin(self, config: Config, start: Path | None) -> state.TrainState:
        """State at step 0, with fresh weights or with those of a file."""
        if start is None:
            return state.initialise(config, self._places, self._adam)
        like = state.abstract(config, self._places, self._adam)
        with np.load(start) as arrays:
            values = {
                part: {name: jnp.asarray(arrays[f"{part}/{name}"]) for name in names}
                for part, names in state.weights_only(like).items()
            }
        return state.begin(config, like, self._adam, values)


def _save(file: Path, now: state.TrainState) -> None:
    """Writes weights and router biases, so that the file appears whole or not at all."""
    content = io.BytesIO()
    parts = state.weights_only(now)
    arrays: Any = {
        f"{part}/{name}": np.asarray(x)
        for part, named in parts.items()
        for name, x in named.items()
    }
    np.savez(content, **arrays)
    files.replace(file, content.getvalue())


def _checked(metrics: dict[str, jax.Array], step: int) -> list[float]:
    """Loss and MTP loss of a step; RunError where one of them or the gradient norm is no number."""
    loss, mtp_loss, norm = (float(metrics[name]) for name in ("loss", "mtp_loss", "grad_norm"))
    if not np.isfinite([loss, mtp_loss, norm]).all():
        raise RunError(f"step {step} has loss {loss}, MTP loss {mtp_loss}, gradient norm {norm}")
    return [loss, mtp_loss]


def perturbed(params: Any, key: jax.Array, size: float) -> Any:
    """Each weight w of a tree as w (1 + size z) with z normal, float32; zeros stay zero."""

    def move(params: Any) -> Any:
        leaves, structure = jax.tree.flatten(params)
        moved = [
            leaf * (1 + size * jax.random.normal(jax.random.fold_in(key, i), leaf.shape))
            for i, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, moved)

    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(move, out_shardings=places)(params)


def means(values: np.ndarray) -> list[list[float]]:
    """Means of each `EVERY` values along the last axis, to five decimals; a rest is left out."""
    whole = values.shape[-1] - values.shape[-1] % EVERY
    tens = values[..., :whole].reshape(*values.shape[:-1], -1, EVERY)
    return tens.mean(-1).round(5).tolist()
