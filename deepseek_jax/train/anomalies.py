"""Anomalies of a run: steps whose loss or gradient norm is not finite, or spikes.

A value spikes where it is above

    limit = median + score * max(1.4826 * MAD, share * median)

of its last `anomaly.window` finite values; 1.4826 * MAD estimates the standard deviation of normal
values, and MAD is the median of their distances from the median. Spikes are in the window, too: up
to half of it they move neither median nor MAD much, and beyond that they are the new level.

The loop dispatches step n before it has read the metrics of step n - 1, so the limits of step n
come from the steps up to n - 2, on every machine and in every process. The window is part of a
checkpoint, so that a resumed run has the same limits to the bit.
"""

import collections
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.config import AnomalyConfig
from deepseek_jax.data import files
from deepseek_jax.errors import RunError
from deepseek_jax.train.append import AppendedFile
from deepseek_jax.train.metrics import Row, json_objects, plain

ANOMALIES = "anomalies.jsonl"

_MOST = float(np.finfo(np.float32).max)  # above it, only infinity
_LEAST_SCALE = {"loss": 0.01, "grad_norm": 0.1}  # as a share of the median


class NotFinite(RunError):
    """A loss, gradient or weight that is NaN or infinite; the message names the last good step."""


class Spike(RunError):
    """A loss or gradient norm far above those before; the message names the last good step."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Largest loss and gradient norm that are no anomaly, exact in float32; numbers or arrays."""

    loss: Any = _MOST
    grad_norm: Any = _MOST


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """A step that is not to be learnt from.

    Attributes:
      step, tokens: as in a row of metrics.
      sequences: first and last of its batch in the stream of training data.
      kind: "not finite", "loss spike", "gradient norm spike" or "weights not finite".
      loss, grad_norm: its values.
      limits: those of this step.
      leaves: weights that are not finite.
    """

    step: int
    tokens: int
    sequences: tuple[int, int]
    kind: str
    loss: float
    grad_norm: float
    limits: Limits
    leaves: str = ""

    def told(self) -> str:
        """The step and what it has, for a message."""
        first, last = self.sequences
        where = f"on sequences {first:,} to {last:,} of the training data"
        values = f"loss {self.loss:.6g}, gradient norm {self.grad_norm:.6g}"
        if self.leaves:
            return f"step {self.step} made values that are NaN or infinite ({self.leaves}), {where}"
        if self.kind == "not finite":
            return f"step {self.step} has {values}, {where}"
        limit = self.limits.loss if self.kind == "loss spike" else self.limits.grad_norm
        return f"step {self.step} has a {self.kind} ({values}, limit {limit:.6g}), {where}"

    def row(self, action: str) -> Row:
        """Line of `anomalies.jsonl`."""

        def known(limit: float) -> float | None:
            return None if limit == _MOST else limit

        return {
            "step": self.step,
            "tokens": self.tokens,
            "sequences": list(self.sequences),
            "kind": self.kind,
            "loss": plain(self.loss),
            "grad_norm": plain(self.grad_norm),
            "loss_limit": known(self.limits.loss),
            "grad_norm_limit": known(self.limits.grad_norm),
            "action": action,
        }

    def error(self, kept: str, cure: str) -> RunError:
        """Error of a run that stops at it."""
        kind = Spike if self.kind.endswith("spike") else NotFinite
        return kind(f"{self.told()}; {kept}. {cure}")


class History:
    """Values of the last steps, the limits that follow from them, and counts of anomalies.

    Attributes:
      skipped, rewinds: updates left out, and times that the run went back.
      streak: anomalies, each with fewer than `window` good steps since the one before.
    """

    def __init__(self, config: AnomalyConfig, state: Mapping[str, Any] | None = None):
        """A history as `state` describes it; None for that of a fresh run."""
        self._config = config
        self._scores = {"loss": config.loss_score, "grad_norm": config.grad_norm_score}
        self._watched = any(self._scores.values())
        values = (state or {}).get("values", [])
        # Two more than a window: those of step n - 1 and n are read before the limits of n + 1 are.
        self._values: collections.deque[tuple[int, float, float]] = collections.deque(
            (tuple(value) for value in values), maxlen=config.window + 2
        )
        counts = (state or {}).get("counts", [0, 0, 0, 0])
        self.skipped, self.rewinds, self.streak, self._good = counts

    def state(self) -> dict[str, Any]:
        """Content for a checkpoint, as JSON values; empty where there is nothing to keep."""
        counts = [self.skipped, self.rewinds, self.streak, self._good]
        if not self._values and not any(counts[:3]):
            return {}
        return {"anomalies": {"values": [list(value) for value in self._values], "counts": counts}}

    def limits(self, step: int) -> Limits:
        """Limits of a step, from the steps up to the one before the last."""
        if not self._watched:
            return Limits()
        known = [value for value in self._values if value[0] <= step - 2][-self._config.window :]
        if len(known) < self._config.window:
            return Limits()
        _, losses, norms = np.array(known).T
        return Limits(self._limit("loss", losses), self._limit("grad_norm", norms))

    def _limit(self, name: str, values: np.ndarray) -> float:
        if not self._scores[name]:
            return _MOST
        median = np.median(values)
        spread = 1.4826 * np.median(np.abs(values - median))
        limit = median + self._scores[name] * max(spread, _LEAST_SCALE[name] * abs(median))
        return float(np.float32(min(limit, _MOST)))

    def judge(
        self, step: int, loss: float, grad_norm: float, skipped: bool | None = None
    ) -> tuple[str, Limits]:
        """Kind of the anomaly that a step is, "" for a good one, and its limits; counts both.

        Args:
          skipped: decision of a program that decides, by the same limits, whether to skip it.
        """
        limits = self.limits(step)
        kind = ""
        if not np.isfinite([loss, grad_norm]).all():
            kind = "not finite"
        elif loss > limits.loss:
            kind = "loss spike"
        elif grad_norm > limits.grad_norm:
            kind = "gradient norm spike"
        if skipped is not None and skipped != bool(kind):  # a compiler may compute a value twice
            kind = "gradient norm spike" if skipped else ""
        if kind != "not finite" and self._watched:
            self._values.append((step, loss, grad_norm))
        if kind:
            self.count()
        else:
            self._good += 1
            if self._good >= self._config.window:
                self.streak = 0
        return kind, limits

    def count(self) -> None:
        """Counts an anomaly in `streak`."""
        self.streak, self._good = self.streak + 1, 0

    def too_many(self) -> bool:
        """Whether anomalies followed one another too closely for the run to go on."""
        return self.streak >= self._config.most

    def after_rewind(self, state: Mapping[str, Any] | None) -> "History":
        """The history of the checkpoint that a run went back to, with the counts of now."""
        old = History(self._config, state)
        old.skipped, old.rewinds = self.skipped, self.rewinds + 1
        old.streak, old._good = self.streak, 0
        return old


class AnomalyFile:
    """`anomalies.jsonl`: an object for each anomaly, in the order in which they came.

    A line that cannot be written waits in memory for the next one.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, AppendedFile(path, create=True)
        self._lines: list[str] = []

    def begin(self, sequences: int) -> None:
        """Drops anomalies of data that the run has not consumed: it will meet them again.

        Args:
          sequences: consumed before the restored state.
        """
        found = read_anomalies(self._path)
        kept = [row for row in found if row["sequences"][1] < sequences]
        if len(kept) < len(found):
            files.replace(self._path, "".join(_line(row) for row in kept))

    def append(self, row: Row) -> None:
        """Writes a line; OSError if it has to wait."""
        self._lines.append(_line(row))
        self.flush()

    def flush(self) -> None:
        """Writes the lines that wait; OSError if they have to wait on."""
        if self._lines:
            self._file.append("".join(self._lines).encode())
            self._lines = []

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def read_anomalies(path: Path) -> list[Row]:
    """The rows of an `anomalies.jsonl`; a line that is not whole is left out."""
    keys = {"step", "tokens", "sequences", "kind"}
    return [row for row in json_objects(path) if row.keys() >= keys]


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
