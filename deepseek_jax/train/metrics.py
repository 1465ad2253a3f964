"""Rows of `metrics.jsonl`: writing and reading.

A row that cannot be written, as on a full disk, is kept in memory and written with the next ones.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deepseek_jax.data import files
from deepseek_jax.train.append import AppendedFile

METRICS = "metrics.jsonl"

SUMMARY = "summary.json"

Row = dict[str, Any]


class Sink(Protocol):
    """A destination of a run's report: screen, file or TensorBoard events.

    A method that raises OSError may be called again.

    Attributes:
      name: its name in a warning.
      lost: what becomes of a row that it cannot write, in the words of a warning.
    """

    name: str
    lost: str

    def begin(self, step: int, tokens: int) -> None: ...
    def say(self, text: str) -> None: ...
    def step(self, row: Row) -> None: ...
    def close(self) -> None: ...


def plain(value: Any) -> Any:
    """A value that JSON can hold: Python numbers, and None for a number that is not finite."""
    if hasattr(value, "__array__"):  # NumPy's and JAX's, without an import of JAX
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl`, each step once and in order.

    A line that is no JSON object with a step is left out: the process was killed while it wrote it.
    """
    rows: list[Row] = []
    for row in json_objects(path):
        if isinstance(row.get("step"), int) and (not rows or row["step"] > rows[-1]["step"]):
            rows.append(row)
    return rows


def json_objects(path: Path) -> Iterator[Row]:
    """Yields the objects of a file of JSON lines; none without a file. Other lines are left out."""
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            if row := json_object(line):
                yield row


def json_object(text: str | bytes) -> Row:
    """The JSON object of a text, with None for NaN and infinity; empty where it is none."""
    try:
        found = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class MetricsFile:
    """`metrics.jsonl`: an object per logged step, in the file as soon as `step` returns.

    Attributes:
      waiting: steps whose rows could not be written yet.
    """

    lost = "its rows wait in memory until it can"

    def __init__(self, path: Path):
        self.name = str(path)
        self.waiting: list[int] = []
        self._path, self._file = path, AppendedFile(path)
        self._lines: list[str] = []

    def begin(self, step: int, tokens: int) -> None:
        kept_rows = [n for n, waiting in enumerate(self.waiting) if waiting <= step]
        self._lines = [self._lines[n] for n in kept_rows]
        self.waiting = [self.waiting[n] for n in kept_rows]
        text = "".join(_line(row) for row in read_metrics(self._path) if row["step"] <= step)
        kept = self._path.is_file() and not self._path.is_symlink()
        if not kept or self._path.read_text(errors="replace") != text:
            files.replace(self._path, text)

    def say(self, text: str) -> None:
        pass

    def step(self, row: Row) -> None:
        self.waiting.append(row["step"])
        self._lines.append(_line(row))
        self.flush()

    def flush(self) -> None:
        """Writes the rows that wait; OSError if they have to wait on."""
        if self.waiting:
            self._file.append("".join(self._lines).encode())
            self.waiting, self._lines = [], []

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def _line(row: Row) -> str:
    if "expert_load" in row:
        load = [[None if x is None else round(x, 6) for x in layer] for layer in row["expert_load"]]
        row = {**row, "expert_load": load}
    return json.dumps(row, allow_nan=False) + "\n"
