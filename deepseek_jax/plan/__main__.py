"""What a layout costs before anyone pays for it.

python -m deepseek_jax.plan --config=FILE [--devices=N] [--json]
    parameters, operations and memory of a config.
python -m deepseek_jax.plan schedule --pipe=8 --micro_batches=20 [--kind=dualpipe] [--json]
    who does what when in a pipeline, and its bubbles beside others'; draws it into --picture.
python -m deepseek_jax.plan step --config=FILE [--costs=costs.pbtxt] [--json]
    a pipelined training step, compiled for a virtual GPU cluster: what its messages travel under,
    what it holds; --costs writes what layout.cost_profile takes. Minutes for a large model.
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
DEVICES = flags.DEFINE_integer("devices", None, "Devices to plan for, where a mesh axis is -1.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
PIPE = flags.DEFINE_integer("pipe", None, "schedule: ranks of the pipeline, as mesh.pipe.")
MICRO = flags.DEFINE_integer("micro_batches", None, "schedule: micro-batches of a step.")
KIND = flags.DEFINE_string("kind", "dualpipe", "schedule: 1f1b, zb1p, dualpipe or dualpipev.")
PICTURE = flags.DEFINE_string("picture", "schedule.png", "schedule: where to draw; empty: nowhere.")
COSTS = flags.DEFINE_string("costs", "", "step: where to write what each instruction costs.")

# What `plan NAME` is given; the name is empty for the plan of a config.
OF = {
    "": ("config", "devices"),
    "schedule": ("pipe", "micro_batches", "kind", "picture"),
    "step": ("config", "costs"),
}
NAMES = tuple(name for name in OF if name)


def main(name: str = "") -> None:
    for flag in sorted({flag for others in OF.values() for flag in others} - set(OF[name])):
        if flags.FLAGS[flag].present:
            raise ConfigError(f"--{flag} does not go with plan {name}".rstrip())
    if name:
        {"schedule": schedule, "step": step}[name]()
        return
    jax.config.update("jax_platforms", "cpu")  # shapes only: never take an accelerator's memory
    planned = layout_report.plan(command.read_config(CONFIG), DEVICES.value)
    print(json.dumps(planned, indent=2) if JSON.value else layout_report.text(planned))


def schedule() -> None:
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
    jax.config.update("jax_platforms", "cpu")  # nothing runs: compiling for GPUs needs none
    file = Path(COSTS.value) if COSTS.value else None
    found = pipelined_step.measure(command.read_config(CONFIG), train_step.lower, file)
    print(json.dumps(found, indent=2) if JSON.value else aligned(found))


if __name__ == "__main__":
    named = any(not argument.startswith("-") for argument in sys.argv[1:2])
    command.run(main, NAMES if named else ())
