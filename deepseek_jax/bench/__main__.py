"""Benchmarks: python -m deepseek_jax.bench NAME [--config=FILE] [--json].

NAME is train, profile, moe, memory, residuals, layer, kernels, grouped, tiles, dispatch, pipeline,
load, decode, speculate, indexer, kinds, cache_formats, precision or skip. The config gives the
recipe, and the benchmark the sizes; kinds and cache_formats read the run in the workdir of
--checkpoint. kernels and layer print each row when it is measured (with --json to standard error),
begin none after --budget seconds, and write or continue --out, a file of measured rates
(`bench/measured_rates.py`).
"""

import functools
import importlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from deepseek_jax import command
from deepseek_jax.bench import NAMES
from deepseek_jax.config import ConfigError
from deepseek_jax.table import text

CONFIG = command.define_config_flag()
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
EMULATE = flags.DEFINE_integer(
    "emulate_devices",
    None,
    "Pretend to have this many CPU devices; pipeline, and dispatch without a GPU: 8.",
)
BUDGET = flags.DEFINE_float(
    "budget", None, "Seconds after which no row begins; kernels: 480, layer: 240.", lower_bound=0.0
)
OUT = flags.DEFINE_string("out", None, "File of measured rates to write or continue.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "runs/v3_tiny", "Workdir of a run; kinds, cache_formats."
)

OF_A_CHECKPOINT = ("kinds", "cache_formats")
PRINTED_AS_MEASURED = ("kernels", "layer")  # rows, of which a killed run leaves those that it has


def main(name: str) -> None:
    """Runs a benchmark and prints its result."""
    config = command.read_config(CONFIG) if CONFIG.value is not None else command.default_config()
    before = _seconds_since_start()
    begin = time.perf_counter()
    measured = importlib.import_module(f"deepseek_jax.bench.{name}").measure
    imported = time.perf_counter() - begin
    _emulate(name)
    found = measured(config, **_given(name))
    if name == "train":
        spent = ("build_seconds", "compile_seconds", "first_step_seconds")
        total = None
        if before is not None and all(key in found for key in spent):
            total = before + imported + sum(found[key] for key in spent)
        found = {**found, "command_to_first_step_seconds": total}
    if name in PRINTED_AS_MEASURED and not JSON.value:
        found = {key: value for key, value in found.items() if not isinstance(value, list)}
    print(json.dumps(found, indent=2) if JSON.value else text(found))


def _given(name: str) -> dict[str, Any]:
    """Arguments of a benchmark besides the config."""
    if name in PRINTED_AS_MEASURED:
        stream = sys.stderr if JSON.value else sys.stdout
        if BUDGET.value is not None and math.isnan(BUDGET.value):
            raise ConfigError("--budget=nan is no number of seconds")
        out = None if OUT.value is None else command.path("out", OUT.value)
        say = functools.partial(print, file=stream, flush=True)
        return {"say": say, "budget": BUDGET.value, "out": out}
    for flag in (BUDGET, OUT):
        if flag.value is not None:
            raise ConfigError(f"bench {name} has no --{flag.name}; leave it out")
    return {"directory": command.folder(CHECKPOINT)} if name in OF_A_CHECKPOINT else {}


def _emulate(name: str) -> None:
    """Emulates CPU devices before JAX starts; without the flag a GPU stays the default."""
    import jax  # here, so that the time of importing it is measured

    from deepseek_jax.runtime import processes

    if EMULATE.value is not None:
        processes.start(emulate_devices=EMULATE.value)
    elif name in ("dispatch", "pipeline"):
        jax.config.update("jax_num_cpu_devices", 8)


def _seconds_since_start() -> float | None:
    """Seconds since this process started, from /proc; None if the system is not Linux."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22, starttime


if __name__ == "__main__":
    command.run(main, NAMES)
