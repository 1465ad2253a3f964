"""Trains a model: python -m deepseek_jax.main --config=configs/v3_tiny.py [--workdir=DIR].

--config.KEY=VALUE sets a key of the config; docs/config.md describes them.
--profile=5 also traces five steps into DIR/profile, for TensorBoard and Perfetto.
"""

import sys

from absl import flags

from deepseek_jax import command
from deepseek_jax.runtime import signals

CONFIG = command.define_config_flag()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; runs/NAME after the config file."
)
STOP_CODE = flags.DEFINE_integer(
    "stop_code",
    0,
    "Exit code of a run that SIGTERM stopped early.",
    lower_bound=0,
    upper_bound=255,
)
PROFILE = flags.DEFINE_integer(
    "profile", None, "Number of steps to trace into WORKDIR/profile, after the first two steps."
)
command.define_process_flags()


def main() -> None:
    """Runs the training that the flags describe."""
    signals.set_code_of_sigterm(STOP_CODE.value)
    config = command.read_config(CONFIG)
    given = WORKDIR.value
    directory = command.path("workdir", f"runs/{command.config_name()}" if given is None else given)
    command.start_processes(config.deadlines.join)
    # These load JAX, which may not see its devices before start-up.
    from deepseek_jax.train import loop, profiling

    if PROFILE.value is not None:
        config = loop.check_devices(config)
        with command.naming({"profile_steps": "--profile"}):
            profiling.check(config, PROFILE.value)
    summary = loop.train(config, directory, profile_steps=PROFILE.value)
    if summary["stopped"]:
        sys.exit(signals.code())


if __name__ == "__main__":
    command.run(main)
