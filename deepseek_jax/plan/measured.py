"""Efficiencies from times that were measured on one device, in place of published ones.

`bench kernels --out=FILE` and `bench layer --out=FILE` write the file (`bench/measured_rates.py`
has its form). Each share is the median over the rows of its pieces, and is the share with which the
plan predicts the measured time of that shape. Rows of the portable form are left out.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import one_line
from deepseek_jax.hardware.chips import chip
from deepseek_jax.plan.layer_work import Matmul
from deepseek_jax.plan.machine import Machine

Row = dict[str, Any]
FORWARD, INPUTS, WEIGHTS = "forward", "input gradient", "weight gradient"


def with_measured(machine: Machine, path: Path) -> tuple[Machine, tuple[str, ...]]:
    """The machine with the efficiencies of a file, and their names.

    Raises:
      ConfigError: A file that cannot be read or holds something else, of another chip, or without a
        row that sets an efficiency.
    """
    device, rows = _read(path)
    _check_chip(machine, device, path)
    found: list[str] = []
    for name, pieces, share in _RULES:
        values = [share(machine, row) for row in rows if (row["piece"], row["recipe"]) in pieces]
        if values:
            found.append(name)
            changed = dataclasses.replace(machine.efficiency, **{name: statistics.median(values)})
            machine = dataclasses.replace(machine, efficiency=changed)
    if not found:
        raise ConfigError(f"--measured={path} has no row that the plan knows")
    return machine, tuple(found)


def _read(path: Path) -> tuple[str, list[Row]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found["device"]), list(map(_row, found["rows"]))
    except OSError as error:
        raise ConfigError(f"--measured={path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = one_line(repr(error), 100)
        raise ConfigError(
            f"--measured={path} is no file of measured rates ({reason}); see bench layer --out"
        ) from error


def _row(row: Row) -> Row:
    shape, seconds = tuple(map(int, row["shape"])), float(row["seconds"])
    if not (0 < seconds < 1e6 and min(shape, default=0) > 0):
        raise ValueError(f"seconds={seconds}, shape={shape}")
    return {
        "piece": str(row["piece"]),
        "recipe": str(row["recipe"]),
        "shape": shape,
        "seconds": seconds,
        "bytes": int(row["bytes"]),
    }


def _check_chip(machine: Machine, device: str, path: Path) -> None:
    try:
        known = chip(device)
    except ValueError:
        return  # a name of the user's own; --hardware decides
    if known is not None and known.peak_flops_per_s == machine.chip.peak_flops_per_s:
        return
    name = "a CPU" if known is None else known.name
    if known is None or known.name != machine.chip.name:
        raise ConfigError(
            f"--measured={path} is of {name}, and --hardware={machine.chip.name}; plan for the one "
            "that was measured"
        )


def _matmul(row: Row) -> Matmul:
    """The product of a row; shapes are rows, inputs, outputs, after the number of experts."""
    grouped, (kind, work) = len(row["shape"]) == 4, row["piece"].split(" ", 1)
    groups, rows, inputs, outputs = row["shape"] if grouped else (1, *row["shape"])
    assert kind in ("linear", "experts")
    if work == WEIGHTS:
        return Matmul(inputs * groups, rows / groups, outputs, groups, gradient=True)
    contraction, columns = (inputs, outputs) if work == FORWARD else (outputs, inputs)
    return Matmul(rows, contraction, columns, groups)


def _matmul_share(name: str) -> Callable[[Machine, Row], float]:
    def share(machine: Machine, row: Row) -> float:
        alone = dataclasses.replace(machine, communication_sms=0)
        predicted = alone.matmul_seconds(_matmul(row), row["recipe"])
        return getattr(machine.efficiency, name) * predicted / row["seconds"]

    return share


def _core_share(backward: bool) -> Callable[[Machine, Row], float]:
    def share(machine: Machine, row: Row) -> float:
        sequences, positions, heads, keys, values = row["shape"]
        widths = 3 * keys + 2 * values if backward else keys + values
        flops = sequences * positions**2 * heads * widths
        return flops / row["seconds"] / machine.peak("bfloat16")

    return share


def _bytes_share(machine: Machine, row: Row) -> float:
    return row["bytes"] / row["seconds"] / machine.chip.hbm_bytes_per_s


def _pieces(recipe: str, *names: str) -> frozenset[tuple[str, str]]:
    return frozenset((name, recipe) for name in names)


def _both(kind: str, *works: str) -> Iterator[str]:
    return (f"{kind} {work}" for work in works)


# Share, recipe and pieces of the rows that set it; later ones are computed with those before.
_MATMULS = (
    ("matmul_fp8", "fp8", (*_both("linear", FORWARD, INPUTS), *_both("experts", FORWARD, INPUTS))),
    ("weight_gradient_fp8", "fp8", ("linear weight gradient",)),
    ("grouped_weight_gradient_fp8", "fp8", ("experts weight gradient",)),
    ("matmul_bf16", "bfloat16", tuple(_both("linear", FORWARD, INPUTS, WEIGHTS))),
    ("grouped_bf16", "bfloat16", tuple(_both("experts", FORWARD, INPUTS))),
    ("grouped_weight_gradient_bf16", "bfloat16", ("experts weight gradient",)),
)
_RULES: tuple[tuple[str, frozenset[tuple[str, str]], Callable[[Machine, Row], float]], ...] = (
    *((name, _pieces(recipe, *each), _matmul_share(name)) for name, recipe, each in _MATMULS),
    ("attention_forward", _pieces("bfloat16", "attention forward"), _core_share(False)),
    ("attention_backward", _pieces("bfloat16", "attention backward"), _core_share(True)),
    ("quantise_forward", _pieces("fp8", "quantise rows"), _bytes_share),
    ("quantise_backward", _pieces("fp8", "quantise tokens", "quantise both"), _bytes_share),
)
