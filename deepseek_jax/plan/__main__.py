"""What a layout costs: python -m deepseek_jax.plan --config=FILE [--devices=N] [--json]."""

import json

import jax
from absl import flags

from deepseek_jax import command
from deepseek_jax.plan import report

CONFIG = command.define_config_flag()
DEVICES = flags.DEFINE_integer("devices", None, "Devices to plan for, where a mesh axis is -1.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # shapes only: never take an accelerator's memory
    planned = report.plan(command.read_config(CONFIG), DEVICES.value)
    print(json.dumps(planned, indent=2) if JSON.value else report.text(planned))


if __name__ == "__main__":
    command.run(main)
