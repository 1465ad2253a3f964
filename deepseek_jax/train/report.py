"""The report of a run: screen, `metrics.jsonl`, TensorBoard events, summary and pictures.

All of it goes through `Report`, which does nothing on every process but process 0. What cannot be
written costs one warning and is tried again at the next row; training goes on. Events, pictures and
lines of the screen are dropped meanwhile; rows wait in memory, and a run that ends without all of
its rows or its summary on disk ends with a RunError.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from deepseek_jax.config import ConfigError
from deepseek_jax.data import files
from deepseek_jax.errors import RunError, reason
from deepseek_jax.runtime.background import in_background
from deepseek_jax.train.anomalies import ANOMALIES, Anomaly, AnomalyFile
from deepseek_jax.train.events import Events
from deepseek_jax.train.metrics import METRICS, SUMMARY, MetricsFile, Row, Sink, plain
from deepseek_jax.train.screens import screen_for

EVENTS = "tensorboard"

_log = logging.getLogger(__name__)


class Report:
    """Everything that a run prints and writes, checkpoints and profiles aside."""

    def __init__(
        self, workdir: Path, *, total_tokens: int, screen: bool = True, primary: bool = True
    ):
        """Writes nothing: files begin with `begin`, so that bad input leaves none behind.

        Args:
          total_tokens: tokens at the end of the run, for the bar and the time left.
          screen: whether to print; False writes the files only.
          primary: whether this is process 0, the only one that prints and writes.
        """
        self._workdir = Path(workdir)
        self._screen = screen_for(total_tokens) if screen and primary else None
        self._rows = MetricsFile(self._workdir / METRICS)
        self._sinks: list[Sink] = []
        if primary:
            self._sinks += [self._rows, Events(self._workdir / EVENTS)]
        if self._screen:  # last: where nobody reads it any more, the row is in the file
            self._sinks.append(self._screen)
        self._anomalies = AnomalyFile(self._workdir / ANOMALIES) if primary else None
        self._failing: set[str] = set()  # names of sinks that could not write their last row

    def begin(self, step: int, tokens: int, sequences: int = 0) -> None:
        """Opens the files in `workdir`, which exists, and the progress on the screen.

        Args:
          step, tokens: steps and tokens of the restored state, 0 for a new run. Rows of later
            steps, which an interrupted run wrote after its last checkpoint, are dropped.
          sequences: of the data, consumed before the restored state; later anomalies are dropped.

        Raises:
          ConfigError: `metrics.jsonl` cannot be read or written.
        """
        for sink in self._sinks:
            try:
                sink.begin(step, tokens)
            except OSError as error:
                if sink is self._rows:
                    raise ConfigError(
                        f"--workdir={self._workdir}: {METRICS} cannot be written ({reason(error)})"
                    ) from error
                self._warn(sink, error)
        if anomalies := self._anomalies:
            self._attempt(ANOMALIES, lambda: anomalies.begin(sequences))

    def rewind(self, step: int, tokens: int) -> None:
        """Drops the rows of later steps than `step`, to which the run has gone back."""
        self._each(lambda sink: None if sink is self._screen else sink.begin(step, tokens))

    def anomaly(self, found: Anomaly, action: str) -> None:
        """Prints an anomaly and writes it to `anomalies.jsonl`.

        Args:
          action: what the run does: "stopped", "skipped" or "rewound to step N".
        """
        if anomalies := self._anomalies:
            self._attempt(ANOMALIES, lambda: anomalies.append(found.row(action)))
        if action != "stopped":  # else the run's error says it
            self.say(f"{found.told()}: {action}")

    def draw(self) -> None:
        """Draws the pictures of a run that ends early."""
        if self._sinks:
            self._attempt("the pictures", self._draw)

    def warn(self, text: str) -> None:
        """Prints a warning, to standard error."""
        _log.warning("%s", text)

    def say(self, text: str) -> None:
        """Prints a line; on a terminal it stays above the progress."""
        self._each(lambda sink: sink.say(text))

    def step(self, metrics: Row) -> None:
        """Reports a step: at least `step` and `tokens`, both counted from the start of the run.

        Values may be Python, NumPy or JAX numbers. `expert_load`, [MoE layer][expert] shares of the
        routed tokens, is rounded and goes to the file alone.
        """
        row = {key: plain(value) for key, value in metrics.items()}
        fine = self._each(lambda sink: sink.step(row))
        self._failing -= fine

    def finish(self, summary: Row) -> None:
        """Writes `summary.json` and the pictures, and prints the result.

        Args:
          summary: fields to keep. `held_out_bits_per_byte`, `gzip_bits_per_byte`, `held_out_bytes`
            and `ema_bits_per_byte` are printed too, and the losses and the fields of trained text
            where there are any; `held_out_loss` is drawn.

        Raises:
          RunError: the summary or rows of `metrics.jsonl` cannot be written.
        """
        if not self._sinks:
            return
        values = {key: plain(value) for key, value in summary.items()}
        text = json.dumps(values, indent=2, allow_nan=False) + "\n"
        failed = self._attempt(SUMMARY, lambda: files.replace(self._workdir / SUMMARY, text))
        self._attempt("the pictures", self._draw)
        if self._screen:  # the progress stays, and the result is printed below it
            self._each(lambda sink: sink.close() if sink is self._screen else None)
        self.say(last_word(values))
        self._attempt("the list of files", self._name_files)
        self.settle()
        if failed:
            raise RunError(
                f"{self._workdir / SUMMARY} cannot be written ({failed}); the run is at its end "
                "and its checkpoint is saved. Make room: the same command scores again"
            )

    def load_plots(self) -> None:
        """Loads in a thread what the pictures need: matplotlib looks for fonts at its first use."""
        if self._sinks:
            in_background(_plots, "load matplotlib")

    def settle(self) -> None:
        """Writes the rows that wait; RunError if they cannot be written."""
        try:
            self._rows.flush()
        except OSError as error:
            raise RunError(
                f"{self._lacking()} ({reason(error)}); its checkpoint is saved"
            ) from error

    def close(self) -> None:
        """Restores the terminal and closes the files; may be called twice."""
        sinks, self._sinks = self._sinks, []
        if self._anomalies:
            self._attempt(ANOMALIES, self._anomalies.close)
        for sink in reversed(sinks):
            try:
                sink.close()
            except OSError as error:
                if sink is self._rows:
                    _log.warning("%s (%s)", self._lacking(), reason(error))

    def _each(self, act: Callable[[Sink], None]) -> set[str]:
        """Names of the sinks with which `act` succeeds; one warning where it begins to fail."""
        fine = set()
        for sink in self._sinks:
            try:
                act(sink)
                fine.add(sink.name)
            except BrokenPipeError:  # nobody reads the screen any more, which ends a command
                raise
            except OSError as error:
                self._warn(sink, error)
        return fine

    def _warn(self, sink: Sink, error: OSError) -> None:
        if sink.name not in self._failing:
            self._failing.add(sink.name)
            _log.warning("%s cannot be written (%s); %s", sink.name, reason(error), sink.lost)

    def _attempt(self, what: str, act: Callable[[], Any]) -> str:
        """Calls `act`; returns the reason for its failure, after a warning, or an empty text."""
        try:
            act()
        except Exception as error:  # of matplotlib's, any
            _log.warning("%s cannot be written (%s)", what, reason(error))
            return reason(error)
        return ""

    def _draw(self) -> None:
        _plots().draw(self._workdir)

    def _name_files(self) -> None:
        names = sorted(path.name + "/" * path.is_dir() for path in self._workdir.iterdir())
        self.say(f"in {self._workdir}: {', '.join(n for n in names if not n.startswith('.'))}")

    def _lacking(self) -> str:
        steps = self._rows.waiting
        span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        return f"{self._rows.name} lacks {len(steps)} rows of {span}"


def _plots() -> ModuleType:
    from deepseek_jax.train import plots

    plots.load()
    return plots


def last_word(summary: Row) -> str:
    """Result, as "held-out 2.31 bits per byte (gzip -9: 2.36) on 412,345 bytes", in two lines."""
    ours, gzip = summary.get("held_out_bits_per_byte"), summary.get("gzip_bits_per_byte")
    if "held_out_bits_per_byte" in summary and ours is None:
        return "finished; the loss on held-out text is not finite"
    if ours is None or gzip is None:
        return "finished; there is no score on held-out text"
    text = f"held-out {ours:.2f} bits per byte (gzip -9: {gzip:.2f})"
    if summary.get("held_out_bytes"):
        text += f" on {summary['held_out_bytes']:,} bytes"
    if summary.get("ema_bits_per_byte") is not None:
        text += f"; averaged weights: {summary['ema_bits_per_byte']:.2f}"
    return text + _beside_training(summary)


def _beside_training(summary: Row) -> str:
    """Line on the loss of trained text beside that of held-out text; empty where one is unknown."""
    losses = summary.get("held_out_loss"), summary.get("trained_loss")
    ours, gzip = summary.get("trained_bits_per_byte"), summary.get("trained_gzip_bits_per_byte")
    if None in (*losses, ours, gzip):
        return ""
    return (
        f"\nnats per token: held-out {losses[0]:.2f}, training text {losses[1]:.2f}; training text "
        f"has {ours:.2f} bits per byte (gzip -9: {gzip:.2f})"
    )
