"""Benchmarks: python -m deepseek_jax.bench NAME [--config=FILE] [--json].

NAME is train, profile, moe, memory, residuals, layer, grouped, tiles, dispatch, pipeline, load,
decode, speculate, kinds or precision. The config gives the recipe, and the benchmark the sizes;
kinds scores the run in the workdir of --checkpoint.
"""

import importlib
import json
import os
import time
from pathlib import Path

from absl import flags

from deepseek_jax import command
from deepseek_jax.bench import NAMES
from deepseek_jax.table import text

CONFIG = command.define_config_flag()
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
EMULATE = flags.DEFINE_integer(
    "emulate_devices",
    None,
    "Pretend to have this many CPU devices; pipeline, and dispatch without a GPU: 8.",
)
CHECKPOINT = flags.DEFINE_string("checkpoint", "runs/v3_tiny", "Workdir of a run; kinds.")


def main(name: str) -> None:
    """Runs a benchmark and prints its result."""
    config = command.read_config(CONFIG) if CONFIG.value is not None else command.default_config()
    before = _seconds_since_start()
    begin = time.perf_counter()
    measured = importlib.import_module(f"deepseek_jax.bench.{name}").measure
    imported = time.perf_counter() - begin
    _emulate(name)
    given = {"directory": command.folder(CHECKPOINT)} if name == "kinds" else {}
    found = measured(config, **given)
    if name == "train":
        spent = ("build_seconds", "compile_seconds", "first_step_seconds")
        total = None
        if before is not None and all(key in found for key in spent):
            total = before + imported + sum(found[key] for key in spent)
        found = {**found, "command_to_first_step_seconds": total}
    print(json.dumps(found, indent=2) if JSON.value else text(found))


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
