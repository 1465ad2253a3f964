"""Planner: cost of a layout without running it.

python -m deepseek_jax.plan --config=FILE [--devices=N] [--json]
    Parameters, operations and memory of a config, estimated.
python -m deepseek_jax.plan schedule --pipe=8 --micro_batches=20 [--kind=dualpipe] [--json]
    A pipeline schedule with its bubbles beside those of other kinds; draws it into --picture.
python -m deepseek_jax.plan step --config=FILE [--costs=costs.pbtxt] [--json]
    A pipelined training step, compiled for a virtual GPU cluster: overlap of its messages and
    memory. --costs writes the file of layout.cost_profile. Takes minutes for a large model.
"""

import json
import sys
from pathlib import Path

import jax
from absl import flags

from deepseek_jax import command
from deepseek_jax.aot import pipelined_step
from deepseek_jax.config import ConfigError
from deepseek_jax.plan import compare_schedules, layout_report, schedule_plot
from deepseek_jax.table import text as aligned
from deepseek_jax.train import step as train_step

CONFIG = command.define_config_flag()
DEVICES = flags.DEFINE_integer(
    "devices", None, "Number of devices, for a mesh axis of -1.", lower_bound=1
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
PIPE = flags.DEFINE_integer("pipe", None, "schedule: ranks of the pipeline, as mesh.pipe.")
MICRO = flags.DEFINE_integer("micro_batches", None, "schedule: micro-batches of a step.")
KIND = flags.DEFINE_string("kind", "dualpipe", "schedule: 1f1b, zb1p, dualpipe or dualpipev.")
PICTURE = flags.DEFINE_string("picture", "schedule.png", "schedule: path of the plot; '' for none.")
COSTS = flags.DEFINE_string("costs", "", "step: path to write the instruction costs to.")

# Name on the command line, empty for the plan of a config -> its flags.
FLAGS_OF = {
    "": ("config", "devices"),
    "schedule": ("pipe", "micro_batches", "kind", "picture"),
    "step": ("config", "costs"),
}
NAMES = tuple(name for name in FLAGS_OF if name)


def main(name: str = "") -> None:
    """Runs `plan NAME`."""
    known = {flag for others in FLAGS_OF.values() for flag in others}
    for flag in sorted(known - set(FLAGS_OF[name])):
        if flags.FLAGS[flag].present:
            raise ConfigError(f"--{flag} does not go with plan {name}".rstrip())
    if name:
        {"schedule": schedule, "step": step}[name]()
        return
    jax.config.update("jax_platforms", "cpu")  # shapes only: never take an accelerator's memory
    planned = layout_report.plan(command.read_config(CONFIG), DEVICES.value)
    print(json.dumps(planned, indent=2) if JSON.value else layout_report.text(planned))


def schedule() -> None:
    """Prints and draws a pipeline schedule."""
    if PIPE.value is None or MICRO.value is None:
        raise ConfigError(
            "schedule needs --pipe=RANKS and --micro_batches=NUMBER, such as 8 and 20"
        )
    built = compare_schedules.build(KIND.value, PIPE.value, MICRO.value)
    compared = compare_schedules.compare(built)
    if PICTURE.value:
        compared["picture"] = str(schedule_plot.draw(built, Path(PICTURE.value)))
    if JSON.value:
        print(json.dumps(compared, indent=2))
        return
    print(compare_schedules.text(compared))
    if "picture" in compared:
        print(f"drawn in {compared['picture']}")


def step() -> None:
    """Compiles a training step for a virtual cluster and prints what was found."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs: compiling for GPUs needs none
    file = Path(COSTS.value) if COSTS.value else None
    found = pipelined_step.measure(command.read_config(CONFIG), train_step.lower, file)
    print(json.dumps(found, indent=2) if JSON.value else aligned(found))


if __name__ == "__main__":
    named = any(not argument.startswith("-") for argument in sys.argv[1:2])
    command.run(main, NAMES if named else ())
