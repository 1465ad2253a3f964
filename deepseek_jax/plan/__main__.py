"""Planner: cost of a layout without running it.

python -m deepseek_jax.plan --config=FILE [--devices=N] [--json]
    Parameters, operations and memory of a config, estimated; --picture=FILE draws the memory in
    each recipe and with each recomputation, and prints it as a table.
python -m deepseek_jax.plan --config=FILE --hardware=h800 [--price=2] [--imbalance=1.2]
    The same, and the time of a step by rank, layer and link, with throughput, days and money, and
    the error of these estimates on published systems. --hardware is a chip's name or a TOML file;
    --measured=FILE takes efficiencies from `bench layer --out=FILE`.
python -m deepseek_jax.plan --config=FILE --compare [--hardware=h800,h100] [--picture=ideas.png]
    The same model with each idea of the report switched off: time, memory, money on each machine.
python -m deepseek_jax.plan --config=FILE --search --devices=N --hardware=h800 [--execution=KIND]
    The fastest layouts that fit, with the flags that start them, and why the next ones lose.
python -m deepseek_jax.plan schedule --pipe=8 --micro_batches=20 [--kind=dualpipe] [--json]
    A pipeline schedule with its bubbles beside those of other kinds; draws it into --picture.
python -m deepseek_jax.plan step --config=FILE [--costs=costs.pbtxt] [--json]
    A pipelined training step, compiled for a virtual GPU cluster: overlap of its messages and
    memory. --costs writes the file of layout.cost_profile. Takes minutes for a large model.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from deepseek_jax import command, config_file
from deepseek_jax.aot import pipelined_step
from deepseek_jax.config import Config, ConfigError, parse
from deepseek_jax.plan import (
    ablations,
    ablations_plot,
    ablations_text,
    compare_schedules,
    device_memory,
    fits,
    layout_report,
    machine_lookup,
    measured,
    memory_errors,
    memory_plot,
    memory_text,
    published_steps,
    published_trace,
    schedule_plot,
    search,
    search_text,
    time_report,
    time_text,
)
from deepseek_jax.plan.device_memory import DeviceMemory
from deepseek_jax.plan.machine import Machine
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
PICTURE = flags.DEFINE_string(
    "picture",
    None,
    "Path of the plot: of the schedule ('' for none; default schedule.png), of --compare, or of "
    "the memory of a config.",
)
COSTS = flags.DEFINE_string("costs", "", "step: path to write the instruction costs to.")
HARDWARE = flags.DEFINE_string(
    "hardware", None, "Machine: h800, h100 and others, or a TOML file; adds times to the plan."
)
PRICE = flags.DEFINE_float(
    "price",
    None,
    "Dollars of a GPU for an hour, with --hardware, at most a million.",
    lower_bound=0.0,
)
MEASURED = flags.DEFINE_string(
    "measured", None, "File of `bench layer --out` to take efficiencies from, with --hardware."
)
IMBALANCE = flags.DEFINE_float(
    "imbalance", 1.0, "Rows of experts of the fullest GPU over the mean, with --hardware.",
    lower_bound=1.0,
)  # fmt: skip

COMPARE = flags.DEFINE_bool("compare", False, "Switch each idea of the report off, one at a time.")
SEARCH = flags.DEFINE_bool("search", False, "Search layouts of --devices on --hardware.")
EXECUTION = flags.DEFINE_enum(
    "execution",
    "lockstep",
    search.EXECUTIONS,
    "search: times as this project's executor runs, or of asynchronous ranks.",
)

# Name on the command line, empty for the plan of a config -> its flags.
FLAGS_OF = {
    "": (
        "config",
        "devices",
        "hardware",
        "price",
        "measured",
        "imbalance",
        "compare",
        "search",
        "execution",
        "picture",
    ),
    "schedule": ("pipe", "micro_batches", "kind", "picture"),
    "step": ("config", "costs"),
}
MOST_DOLLARS = 1_000_000
MOST_CHUNKS = 50_000
_WITH_HARDWARE = ("price", "measured", "imbalance")
_NOT_WITH_COMPARE = ("measured", "imbalance", "search", "execution")
_NOT_WITH_SEARCH = ("imbalance", "picture")
NAMES = tuple(name for name in FLAGS_OF if name)


def main(name: str = "") -> None:
    """Runs `plan NAME`."""
    known = {flag for others in FLAGS_OF.values() for flag in others}
    for flag in sorted(known - set(FLAGS_OF[name])):
        if flags.FLAGS[flag].present:
            raise ConfigError(f"--{flag} does not go with plan {name}".rstrip())
    _check_picture()
    if name:
        {"schedule": schedule, "step": step}[name]()
        return
    jax.config.update("jax_platforms", "cpu")  # shapes only: never take an accelerator's memory
    for number in (PRICE, IMBALANCE):
        if number.value is not None and not math.isfinite(number.value):
            raise ConfigError(f"--{number.name}={number.value}: give a number that is finite")
    if (PRICE.value or 0.0) > MOST_DOLLARS:
        raise ConfigError(
            f"--price={PRICE.value:g}: give dollars an hour, at most {MOST_DOLLARS:,}"
        )
    if COMPARE.value:
        compare()
    elif SEARCH.value:
        search_layouts()
    elif flags.FLAGS["execution"].present:
        raise ConfigError("--execution goes with --search")
    else:
        plan_config()


def plan_config() -> None:
    """Prints the plan of a config, and draws its memory if --picture names a file."""
    alone = [name for name in _WITH_HARDWARE if flags.FLAGS[name].present]
    if HARDWARE.value is None and alone:
        raise ConfigError(f"--{alone[0]} goes with --hardware=h800 or another machine")
    config = layout_report.resolved(command.read_config(CONFIG), DEVICES.value)
    machine, names = _machine(config) if HARDWARE.value is not None else (None, ())
    held = device_memory.device_memory(config)
    room = fits.report(config, machine_lookup.find(HARDWARE.value or "h100").chip)
    planned = {**layout_report.plan(config), "memory": memory_text.row(held), "fits": room}
    shown = f"{memory_text.text(held, memory_errors.kind_of(config))}\n{fits.text(room)}\n"
    if machine is not None:
        timed, times = _timed(config, machine, names)
        planned, shown = {**planned, **timed}, f"{shown}\n{times}"
    if PICTURE.value:
        found = device_memory.by_recipe(config)
        planned["memory_by_recipe"] = device_memory.rows(found)
        planned["picture"] = str(_draw_memory(found, Path(PICTURE.value)))
        shown += f"\n{memory_text.by_recipe(found)}\ndrawn in {planned['picture']}\n"
    if JSON.value:
        print(json.dumps(planned, indent=2))
        return
    print(layout_report.text(planned))
    print(shown, end="")


def _draw_memory(found: Mapping[tuple[str, str], DeviceMemory], path: Path) -> Path:
    """Draws the memory of a config in each recipe and with each recomputation."""
    chip = machine_lookup.find(HARDWARE.value or "h100").chip
    labels = {f"{recipe}, {policy}": memory for (recipe, policy), memory in found.items()}
    title = "Memory of a device by recipe and recomputation (estimated)"
    return memory_plot.draw(labels, chip.hbm_bytes, chip.name, title, path)


def compare() -> None:
    """Prints, and draws, a config without one idea at a time."""
    _refuse("compare", _NOT_WITH_COMPARE)
    config = layout_report.resolved(command.read_config(CONFIG), DEVICES.value)
    names = (HARDWARE.value or "h800,h100").split(",")
    machines = [machine_lookup.find(name, PRICE.value) for name in names]
    compared = ablations.compare(config, machines)
    if PICTURE.value:
        title = f"{compared['devices']:,} devices, one idea switched off at a time (estimated)"
        drawn = ablations_plot.draw(compared, title, Path(PICTURE.value))
        compared["picture"] = str(drawn)
    print(json.dumps(compared, indent=2) if JSON.value else ablations_text.text(compared))
    if PICTURE.value and not JSON.value:
        print(f"drawn in {compared['picture']}")


def search_layouts() -> None:
    """Prints the fastest layouts that fit."""
    _refuse("search", _NOT_WITH_SEARCH)
    if DEVICES.value is None or HARDWARE.value is None:
        raise ConfigError("--search needs --devices=N and --hardware=h800 or another machine")
    machine, config = machine_lookup.find(HARDWARE.value, PRICE.value), command.read_config(CONFIG)
    if MEASURED.value is not None:
        machine, _ = measured.with_measured(machine, command.path("measured", MEASURED.value))
    found = search.search(config, DEVICES.value, machine, execution=EXECUTION.value)
    print(json.dumps(found, indent=2) if JSON.value else search_text.text(found))


def _refuse(mode: str, names: tuple[str, ...]) -> None:
    for name in names:
        if flags.FLAGS[name].present:
            raise ConfigError(f"--{name} does not go with --{mode}")


def _check_picture() -> None:
    """Refuses a --picture whose folder is not there, before anything is computed."""
    folder = Path(PICTURE.value or "").parent
    if PICTURE.value and not folder.is_dir():
        raise ConfigError(
            f"--picture={PICTURE.value}: {folder} is no folder; make it, or name another file"
        )


def _machine(config: Config) -> tuple[Machine, tuple[str, ...]]:
    """Machine of --hardware, and the efficiencies that --measured sets; checks --imbalance."""
    machine = machine_lookup.find(str(HARDWARE.value), PRICE.value)
    machine = machine_lookup.with_messages(machine, config)
    over = config.layout.rules.get("experts", ())
    most = math.prod(getattr(config.mesh, axis) for axis in over)
    if IMBALANCE.value > most:
        raise ConfigError(
            f"--imbalance={IMBALANCE.value:g}: where {most} devices share the experts, the fullest "
            f"has at most {most} times the mean; give 1 to {most}"
        )
    if MEASURED.value is None:
        return machine, ()
    return measured.with_measured(machine, command.path("measured", MEASURED.value))


def _timed(config: Config, machine: Machine, names: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """Times of a config on a machine, and the errors of such times, as dictionary and text."""
    timed = time_report.report(config, machine, imbalance=IMBALANCE.value, measured=names)
    folder = config_file.published()
    v3, moonlight = (
        parse(config_file.load(folder / f"{name}.py")) for name in ("v3_671b", "moonlight_16b")
    )
    trace = published_trace.compare_trace(v3)
    steps = published_steps.published_steps(v3, moonlight)
    shown = f"{time_text.text(timed)}\n\n{time_text.error_text(steps, trace)}\n"
    errors = {"steps": [step.row() for step in steps], "trace": [row.row() for row in trace]}
    return {"time": timed, "errors": errors}, shown


def schedule() -> None:
    """Prints and draws a pipeline schedule."""
    if PIPE.value is None or MICRO.value is None:
        raise ConfigError(
            "schedule needs --pipe=RANKS and --micro_batches=NUMBER, such as 8 and 20"
        )
    if PIPE.value * MICRO.value > MOST_CHUNKS:
        raise ConfigError(
            f"--pipe={PIPE.value} x --micro_batches={MICRO.value} is above {MOST_CHUNKS:,} stages "
            "of micro-batches; draw a smaller schedule"
        )
    built = compare_schedules.build(KIND.value, PIPE.value, MICRO.value)
    compared = compare_schedules.compare(built)
    picture = "schedule.png" if PICTURE.value is None else PICTURE.value
    if picture:
        compared["picture"] = str(schedule_plot.draw(built, Path(picture)))
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
