"""Batches of a run: the rows of each process as global arrays on the devices."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from deepseek_jax.config import Config
from deepseek_jax.data.loader import TrainData
from deepseek_jax.train import token_schedule
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.token_schedule import Hyper


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of one step, besides the state.

    Attributes:
      tokens: [micro-batch, sequence, position + 1] int32, a global array.
      count: real micro-batches; the rest is padding.
      hyper: numbers of the schedule.
      position: state of the data after these micro-batches, for a checkpoint.
    """

    tokens: jax.Array
    count: int
    hyper: Hyper
    position: dict[str, Any]


@dataclasses.dataclass
class Taken:
    """A step that was dispatched; the devices may still be at work on it.

    Attributes:
      number: of the step, since the start of the run.
      tokens: consumed with it, since the start of the run.
      inputs: its arguments besides the state.
      metrics: what it returns besides the state, on the devices.
      copy: the state after it in host memory, if a save needs it after the next step has begun.
      anomaly: kind of its anomaly, where the step has skipped its update.
    """

    number: int
    tokens: int
    inputs: Inputs
    metrics: dict[str, jax.Array]
    copy: TrainState | None = None
    anomaly: str = ""


def share(place: NamedSharding, config: Config) -> tuple[int, int]:
    """Index of this process among those that share each micro-batch's rows, and their number."""
    rows = config.batch.micro_sequences
    first, end = _span(place, (1, rows, 1))
    return first // (end - first), rows // (end - first)


def _span(place: NamedSharding, shape: tuple[int, int, int]) -> tuple[int, int]:
    """First row and last row + 1 of a micro-batch on the devices of this process."""
    held: Any = place.addressable_devices_indices_map(shape).values()
    spans = [index[1].indices(shape[1])[:2] for index in held]
    return min(span[0] for span in spans), max(span[1] for span in spans)


def take(data: TrainData, config: Config, place: NamedSharding, count: int) -> jax.Array:
    """The next `count` micro-batches as one global array, padded to the longest step's number."""
    most = token_schedule.most_micro_batches(config.batch)
    local = np.stack([next(data) for _ in range(count)])
    local = np.pad(local, ((0, most - count), (0, 0), (0, 0)))
    shape = (most, config.batch.micro_sequences, config.batch.length + 1)
    first, _ = _span(place, shape)

    def part(index: Any) -> np.ndarray:
        start, end, _ = index[1].indices(shape[1])
        return local[:, start - first : end - first]

    return jax.make_array_from_callback(shape, place, part)
