"""What a run says: one tidy screen, `metrics.jsonl`, TensorBoard events, a last word and pictures.

Everything goes through `Report`, which is silent on every process but the first.
"""

import atexit
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Protocol

import jax
import numpy as np

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
EVENTS = "tensorboard"
PLAIN_SECONDS = 5.0  # between two progress lines where there is no terminal

# Metric, its name on the screen, and how it is written.
SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss", "{:.3f}".format),
    ("mtp_loss", "MTP loss", "{:.3f}".format),
    ("max_violation", "MaxVio", "{:.2f}".format),
    ("tokens_per_second", "tokens/s", "{:,.0f}".format),
    ("learning_rate", "learning rate", "{:.2e}".format),
    ("grad_norm", "grad norm", "{:.2f}".format),
)

Row = dict[str, Any]


class Sink(Protocol):
    """One place that news goes to."""

    def begin(self, step: int, tokens: int) -> None: ...
    def say(self, text: str) -> None: ...
    def step(self, row: Row) -> None: ...
    def close(self) -> None: ...


class Report:
    """Where a run's news goes; the loop calls it and thinks of nothing else."""

    def __init__(
        self, workdir: Path, *, total_tokens: int, screen: bool = True, primary: bool = True
    ):
        """Nothing is written before `begin`, so that bad input leaves nothing behind.

        Args:
          total_tokens: the run ends there; for the bar and the time left.
          screen: False writes the files only.
          primary: whether this is process 0; every other process is silent and writes nothing.
        """
        self._workdir = Path(workdir)
        self._screen = _screen(total_tokens) if screen and primary else None
        self._sinks: list[Sink] = [self._screen] if self._screen else []
        if primary:
            self._sinks += [MetricsFile(self._workdir / METRICS), Events(self._workdir / EVENTS)]

    def begin(self, step: int, tokens: int) -> None:
        """Opens the files of `workdir`, which exists, and the progress on the screen.

        Args:
          step, tokens: what the restored state has done, 0 for a new run. Rows of later steps,
            which an interrupted run still wrote, are dropped.
        """
        for sink in self._sinks:
            sink.begin(step, tokens)

    def say(self, text: str) -> None:
        """One line of news; on a terminal it stays above the progress."""
        for sink in self._sinks:
            sink.say(text)

    def step(self, metrics: Row) -> None:
        """One logged step: at least `step` and `tokens`, both counted from the start of the run.

        Values may be Python, NumPy or JAX numbers. `expert_load`, [MoE layer][expert] shares of the
        routed tokens, is rounded and goes to the file alone.
        """
        row = {key: plain(value) for key, value in metrics.items()}
        for sink in self._sinks:
            sink.step(row)

    def finish(self, summary: Row) -> None:
        """The last word: `summary.json`, the pictures, and what the run came to.

        Args:
          summary: `held_out_bits_per_byte`, `gzip_bits_per_byte`, `held_out_bytes`, and what else
            should be kept; `ema_bits_per_byte` is said too, `held_out_loss` drawn.
        """
        if not self._sinks:
            return
        from deepseek_jax.train import pictures

        values = {key: plain(value) for key, value in summary.items()}
        _replace(self._workdir / SUMMARY, json.dumps(values, indent=2, allow_nan=False) + "\n")
        pictures.draw(self._workdir)
        if self._screen:  # the progress stands still, and the last word comes below it
            self._screen.close()
        self.say(last_word(values))
        names = sorted(p.name + "/" * p.is_dir() for p in self._workdir.iterdir())
        self.say(f"in {self._workdir}: {', '.join(n for n in names if not n.startswith('.'))}")

    def close(self) -> None:
        """Gives the terminal back and closes the files; may be called twice."""
        for sink in reversed(self._sinks):
            sink.close()
        self._sinks = []


def last_word(summary: Row) -> str:
    """The result in one line, as "held-out 2.31 bits per byte (gzip -9: 2.36) on 412,345 bytes"."""
    ours, gzip = summary.get("held_out_bits_per_byte"), summary.get("gzip_bits_per_byte")
    if ours is None or gzip is None:
        return "finished; there is no score on held-out text"
    text = f"held-out {ours:.2f} bits per byte (gzip -9: {gzip:.2f})"
    if summary.get("held_out_bytes"):
        text += f" on {summary['held_out_bytes']:,} bytes"
    if summary.get("ema_bits_per_byte") is not None:
        text += f"; averaged weights: {summary['ema_bits_per_byte']:.2f}"
    return text


def plain(value: Any) -> Any:
    """A value that JSON can keep: Python numbers, with None for what is not finite."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl`, each step once and in order.

    A line that is no JSON object with a step is left out: what was being written when the process
    was killed.
    """
    rows: list[Row] = []
    if not path.exists():
        return rows
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        whole = isinstance(row, dict) and isinstance(row.get("step"), int)
        if whole and (not rows or row["step"] > rows[-1]["step"]):
            rows.append(row)
    return rows


class MetricsFile:
    """`metrics.jsonl`: one object per logged step, there as soon as it is written."""

    def __init__(self, path: Path):
        self._path = path
        self._file: IO[str] | None = None

    def begin(self, step: int, tokens: int) -> None:
        text = "".join(_line(row) for row in read_metrics(self._path) if row["step"] <= step)
        if not self._path.exists() or self._path.read_text(errors="replace") != text:
            _replace(self._path, text)
        self._file = self._path.open("a")

    def say(self, text: str) -> None:
        pass

    def step(self, row: Row) -> None:
        assert self._file, "begin comes first"
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()


def _line(row: Row) -> str:
    if "expert_load" in row:
        load = [[None if x is None else round(x, 6) for x in layer] for layer in row["expert_load"]]
        row = {**row, "expert_load": load}
    return json.dumps(row, allow_nan=False) + "\n"


def _replace(path: Path, text: str) -> None:
    """Writes a whole file so that a reader finds the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Events:
    """TensorBoard scalars; a resumed run hides what was written past its checkpoint."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Any = None

    def begin(self, step: int, tokens: int) -> None:
        from tensorboardX import SummaryWriter

        purge = step + 1 if self._folder.exists() else None
        suffix = f".{step}"  # a file is named by the second it was made in
        self._writer = SummaryWriter(
            str(self._folder), purge_step=purge, filename_suffix=suffix, flush_secs=10
        )

    def say(self, text: str) -> None:
        pass

    def step(self, row: Row) -> None:
        for key, value in row.items():
            if isinstance(value, int | float) and key != "step":
                self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        if self._writer:
            self._writer.close()


class Progress:
    """How far the run is and how long it will take, in tokens."""

    def __init__(self, total_tokens: int):
        self.total, self.tokens = total_tokens, 0
        self.row: Row = {}
        self._rate = 0.0  # tokens/s, smoothed
        self._rates = 0

    def step(self, row: Row) -> None:
        self.row, self.tokens = row, row["tokens"]
        if rate := row.get("tokens_per_second"):
            # The first one has the compiler in it, so the second starts afresh. Then a memory long
            # enough to be calm and short enough to follow the batch ramp.
            self._rate = 0.8 * self._rate + 0.2 * rate if self._rates > 1 else rate
            self._rates += 1

    @property
    def share(self) -> float:
        return min(self.tokens / self.total, 1.0) if self.total else 1.0

    def left(self) -> str:
        """The time left, as "1:02:03"; "?" before the first step."""
        if not self._rate:
            return "?"
        seconds = round(max(self.total - self.tokens, 0) / self._rate)
        minutes, hours = seconds // 60, seconds // 3600
        clock = f"{minutes % 60}:{seconds % 60:02}"
        return f"{hours}:{minutes % 60:02}:{seconds % 60:02}" if hours else clock

    def values(self) -> Iterable[tuple[str, str]]:
        """Name and text of each metric that the screen shows."""
        for key, name, write in SHOWN:
            if key in self.row:
                value = self.row[key]
                yield name, "not finite" if value is None else write(value)

    def where(self) -> str:
        return f"{self.tokens:,} of {self.total:,} tokens ({100 * self.share:.0f} %)"


def _screen(total_tokens: int) -> Sink:
    progress = Progress(total_tokens)
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        if console.is_interactive:  # False where TERM says that the cursor cannot move
            return LiveScreen(progress, console)
    return PlainScreen(progress)


class PlainScreen:
    """Single lines for a log file or a pipe: the first step, the last, and a calm rate between."""

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic):
        self._progress, self._clock = progress, clock
        self._next = -math.inf
        self._waiting = ""

    def begin(self, step: int, tokens: int) -> None:
        self._progress.tokens = tokens

    def say(self, text: str) -> None:
        self._flush()
        print(text, flush=True)

    def step(self, row: Row) -> None:
        progress = self._progress
        progress.step(row)
        values = ", ".join(f"{name} {text}" for name, text in progress.values())
        self._waiting = f"step {row['step']}: {progress.where()}, {values}, {progress.left()} left"
        if self._clock() >= self._next or progress.share == 1:
            self._flush()

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._waiting:
            print(self._waiting, flush=True)
            self._waiting = ""
            self._next = self._clock() + PLAIN_SECONDS


class LiveScreen:
    """A terminal: news scrolls above, one region below is redrawn in place."""

    def __init__(self, progress: Progress, console: Any):
        self._progress, self._console, self._began = progress, console, 0.0
        self._live: Any = None

    def begin(self, step: int, tokens: int) -> None:
        from rich.live import Live

        self._progress.tokens, self._began = tokens, time.monotonic()
        self._live = Live(get_renderable=self.region, console=self._console, refresh_per_second=2)
        self._live.start()
        atexit.register(self.close)  # an error must not leave a terminal without its cursor

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, row: Row) -> None:
        self._progress.step(row)

    def close(self) -> None:
        if self._live:
            atexit.unregister(self.close)
            self._live.transient = not self._progress.row
            self._live.stop()

    def region(self) -> Any:
        """The bar, and below it each metric under its name."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        progress = self._progress
        if not progress.row:
            waited = time.monotonic() - self._began
            return Text(f"compiling and taking the first step ({waited:.0f} s)", style="dim")
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_row(
            Text(f"step {progress.row['step']:,}", style="bold"),
            ProgressBar(total=1.0, completed=progress.share),
            Text(f"{progress.left()} left" if progress.share < 1 else "done", style="bold"),
        )
        table = Table.grid(padding=(0, 3))
        shown = list(progress.values())
        for _ in shown:
            table.add_column(justify="right", no_wrap=True)
        table.add_row(*(Text(name, style="dim") for name, _ in shown))
        table.add_row(*(Text(value, style="bold") for _, value in shown))
        return Group("", bar, Text(progress.where(), style="dim"), table)
