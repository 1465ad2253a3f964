"""Layouts of a small config as the search ranks them, beside the same layouts compiled.

PYTHONPATH=tests:. .venv/bin/python tests/compiled_layouts.py            prints the table
PYTHONPATH=tests:. .venv/bin/python tests/compiled_layouts.py compile    compiles all again: 10 min

The small config is `moonlight_16b` with two layers on two nodes. Its layouts are drawn by seed from
those that `plan --search` considers in its recipe, one for each of eight meshes and schedules. Each
is compiled for virtual H100s. Memory is what `memory_analysis()` reports. Seconds are those of the
compiled schedule at the assumed rates of `aot/cost_model.py`: the entry, and the body of its loop
over micro-batches or ticks as many times as the program runs it. Overflow rounds do not run.
Compiling needs the CUDA plugin (`pip install -e ".[cluster]"`).
"""

import collections
import dataclasses
import functools
import json
import pathlib
import random
import sys

import jax
from all_configs import load

from deepseek_jax.aot import cluster, compiled, cost_model, pipelined_step
from deepseek_jax.config import DATA_AXES
from deepseek_jax.parallel.pipeline import lockstep, one_f_one_b
from deepseek_jax.plan import candidates, machine_lookup, search, step_time
from deepseek_jax.plan.peak import peak_bytes
from deepseek_jax.table import text
from deepseek_jax.train import step

FILE = pathlib.Path(__file__).parents[1] / "docs/data/compiled_layouts.json"
DEVICES, COUNT = 16, 8
H800 = machine_lookup.find("h800")  # compiled as an H100; the links are the H800's


@functools.cache
def base():
    """The small config."""
    config = load("moonlight_16b")
    model = dataclasses.replace(config.model, layers=2)
    batch = dataclasses.replace(config.batch, sequences=512, ramp_sequences=512)
    return dataclasses.replace(config, model=model, batch=batch)


def layouts():
    """Configs of the layouts: the first COUNT of ten, drawn by seed from families with messages."""
    families = collections.defaultdict(list)
    for config in candidates.candidates(base(), DEVICES, H800):
        known = config.precision.recipe == base().precision.recipe
        if known and config.mesh.node * config.mesh.gpu > 1 and rows_per_device(config) <= 4:
            families[search.family_of(config)].append(config)
    draw = random.Random(0)
    return [draw.choice(families[family]) for family in draw.sample(sorted(families), 10)][:COUNT]


def rows_per_device(config):
    parts = 1
    for axis in DATA_AXES:
        parts *= getattr(config.mesh, axis)
    return config.batch.micro_sequences // parts


def planned(config):
    """(bytes of a device, seconds of a step) as the search has them."""
    times = step_time.times(config, machine_lookup.with_messages(H800, config))
    return peak_bytes(config), step_time.step_time(times, "lockstep").total


def measured(config):
    """(bytes of a device, seconds of a step) of the compiled program; seconds are estimated."""
    mesh = cluster.mesh(config.mesh)
    executable = cluster.compile_for(step.lower(config, mesh))
    program = compiled.read(executable, mesh, pipelined_step.KERNELS)
    return program.peak_bytes, seconds(program, runs(config))


def seconds(program, many):
    """Seconds of a step whose loop over micro-batches or ticks runs `many` times."""
    costs = pipelined_step.costs(program, cost_model.Rates())

    def replay(computation=""):
        return cost_model.replay(program, costs, computation, unknown_trips=0).total

    def loops(computation):
        lines = program.module.computations[computation].values()
        return [line for line in lines if line.opcode == "while"]

    outer = max(loops(program.module.entry), key=lambda line: replay(line.body))
    # The ends of a pipeline's model: loops that run once, on some ranks.
    ends = [
        line.body
        for line in loops(outer.body)
        if line.trips is None and "overflow_rounds" not in line.op_name
    ]
    inside = sum(map(replay, ends)) + (replay(outer.body) if outer.trips is None else 0.0)
    return replay() + many * inside


def runs(config):
    """Runs of the outer loop's body in a step."""
    many = step_time.micro_batches(config)
    if config.mesh.pipe == 1:
        return many / config.layout.micro_batches_in_flight
    if config.layout.pipeline == "1f1b":
        return one_f_one_b.OneFOneB(config.mesh.pipe, skip=False).ticks(many)
    built = step_time.build(config, config.layout.pipeline)
    return lockstep.lockstep(built).count / 2  # two ticks


def compile_all():
    """Compiles every layout and writes the file."""
    rows = []
    for config in layouts():
        flags = candidates.overrides(config, base())
        print(" ".join(flags), flush=True)
        peak, estimated = measured(config)
        rows.append({"flags": flags, "peak_bytes": peak, "seconds": estimated})
        print(f"  {peak / 2**30:.2f} GiB, {estimated:.3f} s", flush=True)
        made = {"source": __doc__.splitlines()[0], "jax": jax.__version__, "rows": rows}
        FILE.write_text(json.dumps(made, indent=1) + "\n")


def compared():
    """Rows of planned and compiled memory and time."""
    rows = {" ".join(row["flags"]): row for row in json.loads(FILE.read_text())["rows"]}
    found = []
    for config in layouts():
        row = rows.pop(" ".join(candidates.overrides(config, base())))
        peak, estimated = planned(config)
        found.append(
            {
                "layout": " ".join(flag.removeprefix("--config.") for flag in row["flags"]),
                "planned_GiB": peak / 2**30,
                "compiled_GiB": row["peak_bytes"] / 2**30,
                "error": peak / row["peak_bytes"] - 1,
                "planned_s": estimated,
                "compiled_s": row["seconds"],
            }
        )
    assert not rows, f"compile again: {', '.join(rows)} are no layouts of this file"
    return found


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    if sys.argv[1:] == ["compile"]:
        compile_all()
    else:
        print(text({"rows": compared()}))
