"""Trains a model: python -m deepseek_jax.main --config=configs/v3_tiny.py [--workdir=DIR].

--profile=5 also traces five steps into DIR/profile, for TensorBoard and Perfetto.
"""

import signal
import sys
from pathlib import Path

from absl import flags

from deepseek_jax import command

CONFIG = command.define_config_flag()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; runs/NAME after the config file."
)
STOP_CODE = flags.DEFINE_integer("stop_code", 0, "Exit code of a run that SIGTERM stopped early.")
PROFILE = flags.DEFINE_integer(
    "profile", None, "Number of steps to trace into WORKDIR/profile, after the first two steps."
)
command.define_process_flags()


def main() -> None:
    """Runs the training that the flags describe."""
    # Before the loop handles SIGTERM there is nothing to save.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOP_CODE.value))
    config = command.read_config(CONFIG)
    command.start_processes()
    # These load JAX, which may not see its devices before start-up.
    from deepseek_jax.train import loop, profiling

    directory = Path(WORKDIR.value or f"runs/{command.config_name()}")
    if PROFILE.value is not None:
        config = loop.check_devices(config)
        with command.naming({"profile_steps": "--profile"}):
            profiling.check(config, PROFILE.value)
    summary = loop.train(config, directory, profile_steps=PROFILE.value)
    if summary["stopped"]:
        sys.exit(STOP_CODE.value)


if __name__ == "__main__":
    command.run(main)
