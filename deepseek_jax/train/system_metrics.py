"""Metrics of the system that trains: time, FLOP/s, and device memory.

All times are wall times of this process. Compilation and the writing of a profile are left out of
every time but their own. A step's time is from the end of the step before to its own end, both on
the devices. It is idle from there until it is dispatched: no step is in flight.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
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
      waited: seconds in which the loop waited for their data, beside the step before or not.
      idle: seconds of their wall time in which no step was in flight.
      steps, tokens: steps taken, and tokens consumed.
    """

    seconds: float = 0.0
    waited: float = 0.0
    idle: float = 0.0
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
        """A clock that `start` starts.

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
        self._waited = 0.0  # for the data of the next step
        self._called = 0.0  # when the last call that starts a step began
        self._dispatched: collections.deque[tuple[float, Spent, Future[float]]] = (
            collections.deque()
        )
        self.start()

    def start(self) -> None:
        """Starts the clock anew: the first step begins."""
        self._since = self._clock()  # end of the step before; earlier time is in the row's sums

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """A span of time that is compilation, and no step's."""
        before = self._clock()
        with self.excluded():
            yield
        self._compile_seconds = self._clock() - before

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """A span of time that is no step's, unless a step is in flight."""
        if self._dispatched:
            yield
            return
        before = self._clock() - self._since
        self._row += Spent(seconds=before, idle=before)
        yield
        self._since = self._clock()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """A span in which the loop waits for the tokens of the next step."""
        before = self._clock()
        yield
        self._waited += self._clock() - before

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """The call that starts a step."""
        self._called = self._clock()
        yield

    def dispatched(self, tokens: int, ready: Future[float], *, within: bool = False) -> None:
        """Counts a step that is in flight from now on.

        Args:
          tokens: of this step.
          ready: the time when it is done, of the same clock.
          within: whether its call may run it, or a part, as on the CPUs of several processes; it
            was in flight from the beginning of the call, then.
        """
        began = self._called if within else self._clock()
        spent = Spent(waited=self._waited, steps=1, tokens=tokens)
        self._dispatched.append((began, spent, ready))
        self._waited = 0.0

    def done(self) -> None:
        """Waits for the end of the oldest step in flight, and takes its time."""
        dispatched, spent, ready = self._dispatched.popleft()
        end = ready.result()
        spent.seconds, spent.idle = end - self._since, max(dispatched - self._since, 0.0)
        self._row, self._since = self._row + spent, end

    def row(self) -> Row:
        """The fields of the steps that were done since the row before.

        `compile_seconds` is in the first row after the compilation.
        """
        row = self._row
        compiled = self._compile_seconds if not self._rows.steps else None
        self._row, self._rows = Spent(), self._rows + row
        return self._fields(row, compiled)

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
            "idle_share": spent.idle / spent.seconds,
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
