"""The report of a run: screen, `metrics.jsonl`, TensorBoard events, summary and pictures.

All of it goes through `Report`, which does nothing on every process but process 0.
"""

import json
from pathlib import Path
from typing import Any

from deepseek_jax.train.metrics import METRICS, SUMMARY, MetricsFile, Row, Sink, plain, replace_file
from deepseek_jax.train.screens import screen_for

EVENTS = "tensorboard"


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
        self._sinks: list[Sink] = [self._screen] if self._screen else []
        if primary:
            self._sinks += [MetricsFile(self._workdir / METRICS), Events(self._workdir / EVENTS)]

    def begin(self, step: int, tokens: int) -> None:
        """Opens the files in `workdir`, which exists, and the progress on the screen.

        Args:
          step, tokens: steps and tokens of the restored state, 0 for a new run. Rows of later
            steps, which an interrupted run wrote after its last checkpoint, are dropped.
        """
        for sink in self._sinks:
            sink.begin(step, tokens)

    def say(self, text: str) -> None:
        """Prints a line; on a terminal it stays above the progress."""
        for sink in self._sinks:
            sink.say(text)

    def step(self, metrics: Row) -> None:
        """Reports a step: at least `step` and `tokens`, both counted from the start of the run.

        Values may be Python, NumPy or JAX numbers. `expert_load`, [MoE layer][expert] shares of the
        routed tokens, is rounded and goes to the file alone.
        """
        row = {key: plain(value) for key, value in metrics.items()}
        for sink in self._sinks:
            sink.step(row)

    def finish(self, summary: Row) -> None:
        """Writes `summary.json` and the pictures, and prints the result.

        Args:
          summary: fields to keep. `held_out_bits_per_byte`, `gzip_bits_per_byte`, `held_out_bytes`
            and `ema_bits_per_byte` are printed too, and `held_out_loss` is drawn.
        """
        if not self._sinks:
            return
        from deepseek_jax.train import plots

        values = {key: plain(value) for key, value in summary.items()}
        replace_file(self._workdir / SUMMARY, json.dumps(values, indent=2, allow_nan=False) + "\n")
        plots.draw(self._workdir)
        if self._screen:  # the progress stays, and the result is printed below it
            self._screen.close()
        self.say(last_word(values))
        names = sorted(p.name + "/" * p.is_dir() for p in self._workdir.iterdir())
        self.say(f"in {self._workdir}: {', '.join(n for n in names if not n.startswith('.'))}")

    def close(self) -> None:
        """Restores the terminal and closes the files; may be called twice."""
        for sink in reversed(self._sinks):
            sink.close()
        self._sinks = []


def last_word(summary: Row) -> str:
    """Result in a line, as "held-out 2.31 bits per byte (gzip -9: 2.36) on 412,345 bytes"."""
    ours, gzip = summary.get("held_out_bits_per_byte"), summary.get("gzip_bits_per_byte")
    if ours is None or gzip is None:
        return "finished; there is no score on held-out text"
    text = f"held-out {ours:.2f} bits per byte (gzip -9: {gzip:.2f})"
    if summary.get("held_out_bytes"):
        text += f" on {summary['held_out_bytes']:,} bytes"
    if summary.get("ema_bits_per_byte") is not None:
        text += f"; averaged weights: {summary['ema_bits_per_byte']:.2f}"
    return text


class Events:
    """TensorBoard scalars; a resumed run hides those of steps after its checkpoint."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Any = None

    def begin(self, step: int, tokens: int) -> None:
        from tensorboardX import SummaryWriter

        purge = step + 1 if self._folder.exists() else None
        suffix = f".{step}"  # the rest of the name is the second in which the file was made
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
