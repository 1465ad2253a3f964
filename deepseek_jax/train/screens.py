"""The screen of a run: a live region on a terminal, plain lines elsewhere."""

import atexit
import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from deepseek_jax.train.metrics import Row, Sink

SCREEN, DROPPED = "standard output", "lines are dropped until it can"
PLAIN_SECONDS = 5.0  # between two progress lines where there is no terminal

# A metric, its name on the screen, and how its value is written.
Shown = tuple[tuple[str, str, Callable[[float], str]], ...]

MODEL: Shown = (
    ("loss", "loss", "{:.3f}".format),
    ("mtp_loss", "MTP loss", "{:.3f}".format),
    ("max_violation", "MaxVio", "{:.2f}".format),
    ("learning_rate", "learning rate", "{:.2e}".format),
    ("grad_norm", "grad norm", "{:.2f}".format),
)

SYSTEM: Shown = (
    ("tokens_per_second", "tokens/s", "{:,.0f}".format),
    ("step_seconds", "step time", "{:.3g} s".format),
    ("mfu", "MFU", "{:.1%}".format),
    ("device_bytes_peak", "peak memory", lambda size: f"{size / 1e9:.1f} GB"),
)


class Progress:
    """Tokens that a run has consumed, and the time that it has left."""

    def __init__(self, total_tokens: int):
        self.total, self.tokens = total_tokens, 0
        self.row: Row = {}
        self._rate = 0.0  # tokens/s, smoothed
        self._rates = 0

    def step(self, row: Row) -> None:
        self.row, self.tokens = row, row["tokens"]
        if rate := row.get("tokens_per_second"):
            # The first row has the start-up of the devices in it, so the second one replaces it.
            # The mean after that is long enough to be calm and short enough to follow the ramp.
            self._rate = 0.8 * self._rate + 0.2 * rate if self._rates > 1 else rate
            self._rates += 1

    @property
    def share(self) -> float:
        """Consumed share of the run's tokens, at most 1."""
        return min(self.tokens / self.total, 1.0) if self.total else 1.0

    def left(self) -> str:
        """Time left, as "1:02:03"; "?" before the first step."""
        if not self._rate:
            return "?"
        seconds = round(max(self.total - self.tokens, 0) / self._rate)
        minutes, hours = seconds // 60, seconds // 3600
        clock = f"{minutes % 60}:{seconds % 60:02}"
        return f"{hours}:{minutes % 60:02}:{seconds % 60:02}" if hours else clock

    def values(self, shown: Shown) -> Iterable[tuple[str, str]]:
        """Name and text of each metric of `shown` that the last row has."""
        for key, name, write in shown:
            if key in self.row:
                value = self.row[key]
                yield name, "not finite" if value is None else write(value)

    def where(self) -> str:
        """Consumed tokens as a line."""
        return f"{self.tokens:,} of {self.total:,} tokens ({100 * self.share:.0f} %)"


def screen_for(total_tokens: int) -> Sink:
    """The screen that fits standard output: live on a terminal, lines elsewhere."""
    progress = Progress(total_tokens)
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        if console.is_interactive:  # False where TERM says that the cursor cannot move
            return LiveScreen(progress, console)
    return PlainScreen(progress)


class PlainScreen:
    """Single lines for a log file or a pipe: the first step, the last, and some between them."""

    name, lost = SCREEN, DROPPED

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
        values = ", ".join(f"{name} {text}" for name, text in progress.values(MODEL + SYSTEM))
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
    """A terminal: lines scroll above, and one region below is redrawn in place."""

    name, lost = SCREEN, DROPPED

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
        """The bar, and below it the values of model and system, each under its name."""
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
        tables = []
        for shown in (list(progress.values(part)) for part in (MODEL, SYSTEM)):
            table = Table.grid(padding=(0, 3))
            for _ in shown:
                table.add_column(justify="right", no_wrap=True)
            table.add_row(*(Text(name, style="dim") for name, _ in shown))
            table.add_row(*(Text(value, style="bold") for _, value in shown))
            tables.append(table)
        return Group("", bar, Text(progress.where(), style="dim"), *tables)
