"""Time of a training step by part of the model, from a profile, beside the time of its matmuls.

The model is that of `bench train`. XLA's CPU client records each operation that it runs, on each of
its threads, so that the sum over threads exceeds the step's time; `taskset -c 0` makes them equal.
The floor is the time of the step's floating-point operations at the speed of a large square matmul.
"""

import collections
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.bench import train
from deepseek_jax.config import Config
from deepseek_jax.model.flops import training_flops_per_token

STEPS = 5  # steps in a profile
PARTS = (
    "loss", "attention", "shared_experts", "experts", "dense_ffn", "router", "dispatch", "norm",
    "embedding", "optimizer",
)  # fmt: skip
_CONTAINERS = ("while", "conditional", "call")  # operations that run others
_MATMULS = ("dot", "ynn_fusion")


def measure(config: Config) -> dict[str, Any]:
    """Profiles steps of the benchmark's model; times are milliseconds per step.

    Returns:
      `profile`, a list of rows part, matmul_ms, other_ms, the largest first; their sums; the time
      of the step without a profile, and the floor.
    """
    config = train.sized(config)
    stepper = train.Stepper.of(config)
    stepper.run()
    seconds, peak = [], 0.0
    for _ in range(STEPS):
        peak = max(peak, train.matmul_flops_per_second())
        seconds.append(stepper.run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                stepper.run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        spent = dict(by_part(operations(file), scopes(stepper.program)))
    rows = [
        {"part": part, "matmul_ms": matmul / STEPS / 1e6, "other_ms": other / STEPS / 1e6}
        for part, (matmul, other) in sorted(spent.items(), key=lambda item: -sum(item[1]))
    ]
    flops = stepper.tokens * training_flops_per_token(config.model, config.batch.length)
    return {
        "profile": rows,
        "matmul_ms": sum(row["matmul_ms"] for row in rows),
        "other_ms": sum(row["other_ms"] for row in rows),
        "step_ms": 1e3 * float(np.median(seconds)),
        "floor_ms": 1e3 * flops / peak,
    }


def operations(file: Path) -> Iterator[tuple[str, float]]:
    """Yields name and nanoseconds of each operation in a profile."""
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if any(name == "hlo_op" for name, _ in event.stats):
                    yield event.name, event.duration_ns


def scopes(program: str) -> dict[str, str]:
    """Path of named scopes of each operation in the text of a compiled program."""
    found = re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', program, re.MULTILINE)
    return dict(found)


def by_part(
    spent: Iterator[tuple[str, float]], scope_of: dict[str, str]
) -> dict[str, tuple[float, float]]:
    """Nanoseconds in matmuls and in other operations, by part of the model."""
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, nanoseconds in spent:
        if not name.startswith(_CONTAINERS):
            sums[part_of(scope_of.get(name, ""))][not name.startswith(_MATMULS)] += nanoseconds
    return {part: (matmul, other) for part, (matmul, other) in sums.items()}


def part_of(scope: str) -> str:
    """The innermost of PARTS on a path of scopes, else "rest"."""
    inside = [name for name in re.split(r"[/()]", scope) if name in PARTS]
    return inside[-1] if inside else "rest"
