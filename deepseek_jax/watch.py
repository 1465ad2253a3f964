"""Shows a run from its files: python -m deepseek_jax.watch --workdir=DIR.

One screen, refreshed every two seconds, until Ctrl-C. --once prints it once, and --json one JSON
object, for scripts. Without a terminal one screen is printed, too; --prometheus goes on there. It
reads, computes nothing, and disturbs no run.
"""

import json
import sys
import time
from pathlib import Path

from absl import flags

from deepseek_jax import command
from deepseek_jax.config import ConfigError
from deepseek_jax.runtime import signals
from deepseek_jax.train import run_files, status_metrics, status_screen
from deepseek_jax.train.metrics import Row

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
JSON = flags.DEFINE_boolean("json", False, "Print one JSON object and end.")
ONCE = flags.DEFINE_boolean("once", False, "Print one screen and end.")
EVERY = flags.DEFINE_float("every", 2.0, "Seconds between two screens.")
PROMETHEUS = flags.DEFINE_string(
    "prometheus", None, "A text file (*.prom) for Prometheus's node exporter to write each time."
)


def main() -> None:
    """Shows the run until Ctrl-C, or once."""
    if not WORKDIR.value:
        raise ConfigError("watch needs --workdir=DIR")
    if not 0.1 <= EVERY.value <= 86_400:
        raise ConfigError(f"--every={EVERY.value}; expected 0.1 to 86,400 seconds")
    workdir = command.folder(WORKDIR)
    target = _gauges()
    found = _look(workdir, target)
    if JSON.value:
        print(json.dumps(found, allow_nan=False))
        return
    from rich.console import Console

    console = Console()
    terminal = sys.stdout.isatty() and console.is_interactive
    if ONCE.value or not terminal:
        console.print(status_screen.screen(found, console.width))
    if ONCE.value or not (terminal or target):
        return
    from rich.live import Live

    try:
        while not terminal:  # a service, which writes the gauges
            time.sleep(EVERY.value)
            _look(workdir, target)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(status_screen.screen(found, console.width), refresh=True)
                time.sleep(EVERY.value)
                found = _look(workdir, target)
    except (KeyboardInterrupt, signals.Stopped):
        if terminal:
            console.print(status_screen.screen(found, console.width))  # stays on the terminal


def _gauges() -> Path | None:
    """The file of --prometheus; ConfigError for a name that node exporter leaves out."""
    if PROMETHEUS.value is None:
        return None
    target = command.path("prometheus", PROMETHEUS.value)
    if target.suffix != ".prom":
        raise ConfigError(
            f"--prometheus={target}; expected a name that ends with .prom, since the textfile "
            "collector reads no other"
        )
    return target


def _look(workdir: Path, target: Path | None) -> Row:
    found = run_files.status(workdir)
    if target:
        status_metrics.write(found, target)
    return found


if __name__ == "__main__":
    command.run_without_jax(main)
