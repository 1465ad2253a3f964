"""Metrics of the system that trains: time, FLOP/s, and device memory.

All times are wall times of this process. Compilation and the writing of a profile are left out of
every time but their own.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from deepseek_jax.config import Config
from deepseek_jax.hardware import chips
from deepseek_jax.model.flops import training_flops_per_token
from deepseek_jax.precision.recipes import recipe
from deepseek_jax.train.metrics import Row


@dataclasses.dataclass
class Spent:
    """Sums over consecutive steps.

    Attributes:
      seconds: wall time of the steps.
      waited: seconds of these in which a step waited for its data.
      steps, tokens: steps taken, and tokens consumed.
    """

    seconds: float = 0.0
    waited: float = 0.0
    steps: int = 0
    tokens: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Spent(*(a + b for a, b in pairs))


class SystemMetrics:
    """Clock of a run: the loop tells it what it does, and asks for the fields of a row.

    A row covers the steps since the row before; the summary covers the rows of this process.
    """

    def __init__(
        self,
        config: Config,
        *,
        devices: int,
        local_devices: Sequence[Any],
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Starts the clock.

        Args:
          devices: number of devices of the whole run.
          local_devices: devices of this process.
          clock: seconds of a monotonic clock.
        """
        self._clock, self._local, self._devices = clock, local_devices, devices
        self._flops_per_token = training_flops_per_token(config.model, config.batch.length)
        dtype = recipe(config.precision.recipe).matmul_dtype
        self._peak = chips.peak_flops_per_s(local_devices[0].device_kind, dtype)
        self._compile_seconds: float | None = None
        self._row, self._rows = Spent(), Spent()
        self._resumed = clock()  # the row's time before this is in its sums, or is no step's

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """A span of time that is compilation, and no step's."""
        before = self._clock()
        with self.excluded():
            yield
        self._compile_seconds = self._clock() - before

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """A span of time that is no step's."""
        self._row.seconds += self._clock() - self._resumed
        yield
        self._resumed = self._clock()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """A span of a step in which it waits for its tokens."""
        before = self._clock()
        yield
        self._row.waited += self._clock() - before

    def stepped(self, tokens: int) -> None:
        """Counts a step that is done, of so many tokens."""
        self._row.steps += 1
        self._row.tokens += tokens

    @contextlib.contextmanager
    def row(self) -> Iterator[Row]:
        """The fields of the steps since the row before; writing the row is no step's time.

        `compile_seconds` is in the first row after the compilation.
        """
        with self.excluded():
            row = self._row
            compiled = self._compile_seconds if not self._rows.steps else None
            self._row, self._rows = Spent(), self._rows + row
            yield self._fields(row, compiled)

    def summary(self) -> Row:
        """The fields of all rows of this process; none where there are no rows."""
        return self._fields(self._rows, self._compile_seconds) if self._rows.steps else {}

    def _fields(self, spent: Spent, compile_seconds: float | None) -> Row:
        tokens_per_second = spent.tokens / spent.seconds
        flops = tokens_per_second * self._flops_per_token / self._devices
        fields = {
            "tokens_per_second": tokens_per_second,
            "step_seconds": spent.seconds / spent.steps,
            "data_seconds": spent.waited / spent.steps,
            "compile_seconds": compile_seconds,
            "model_flops_per_second": flops,
            "mfu": flops / self._peak if self._peak else None,
            **_memory(self._local),
        }
        return {name: value for name, value in fields.items() if value is not None}


def _memory(devices: Sequence[Any]) -> dict[str, int | None]:
    """Bytes in use now, and at most since the process began, on the fullest device."""
    stats = [device.memory_stats() or {} for device in devices]

    def most(key: str) -> int | None:
        return max((each[key] for each in stats if key in each), default=None)

    return {
        "device_bytes_in_use": most("bytes_in_use"),
        "device_bytes_peak": most("peak_bytes_in_use"),
    }


def of(config: Config) -> SystemMetrics:
    """The clock of a run on the devices of JAX."""
    return SystemMetrics(config, devices=jax.device_count(), local_devices=jax.local_devices())
