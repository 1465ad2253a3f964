"""Trains: python -m deepseek_jax.main --config=configs/v3_tiny.py [--workdir=DIR]."""

import signal
import sys
from pathlib import Path

from absl import flags

from deepseek_jax import command

CONFIG = command.define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; runs/NAME of the config's name.")
STOP_CODE = flags.DEFINE_integer("stop_code", 0, "Exit code of a run that SIGTERM stopped early.")
command.define_process_flags()


def main() -> None:
    # Until the loop listens there is nothing to save.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOP_CODE.value))
    config = command.read_config(CONFIG)
    command.start_processes()
    from deepseek_jax.train import loop  # after start-up: JAX must not have met its devices before

    directory = Path(WORKDIR.value or f"runs/{command.config_name()}")
    try:
        summary = loop.train(config, directory)
    except loop.NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if summary["stopped"]:
        sys.exit(STOP_CODE.value)


if __name__ == "__main__":
    command.run(main)
