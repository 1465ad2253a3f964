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

RateKey = tuple[str, str, tuple[int, ...]]  # piece, recipe, shape
Share = Callable[["Machine", "MeasuredRate"], float]  # value of an efficiency by one rate
MOST = 10.0  # times the peak or bandwidth: small arrays in the L2 cache pass the memory's
_SIZES = {"linear": 3, "experts": 4, "attention": 5}  # numbers in a shape, by a piece's first word
FORWARD, INPUTS, WEIGHTS = "forward", "input gradient", "weight gradient"


@dataclasses.dataclass(frozen=True)
class MeasuredRate:
    """Time of a computation on one device.

    Attributes:
      piece, recipe, shape, flops, bytes: As `bench/measured_rates.py` says.
      seconds: Median of one run.
    """

    piece: str
    recipe: str
    shape: tuple[int, ...]
    seconds: float
    flops: int
    bytes: int

    @property
    def key(self) -> RateKey:
        """Identity of the computation: measured again, it replaces the time before."""
        return self.piece, self.recipe, self.shape


def read(path: Path, flag: str) -> tuple[str, list[MeasuredRate]]:
    """Device and rates of a file.

    Args:
      flag: Name of the flag that gave the path, for messages.

    Raises:
      ConfigError: It cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found["device"]), list(map(_rate, found["rows"]))
    except OSError as error:
        raise ConfigError(f"--{flag}={path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"--{flag}={path} is no file of measured rates; give another name, such as that of "
            f"bench layer --out ({one_line(repr(error), 100)})"
        ) from error


def with_measured(machine: Machine, path: Path) -> tuple[Machine, tuple[str, ...]]:
    """The machine with the efficiencies of a file, and their names.

    Raises:
      ConfigError: A file that cannot be read or holds something else, of another chip, or without a
        row that sets an efficiency.
    """
    device, rates = read(path, "measured")
    _check_chip(machine, device, path)
    found: list[str] = []
    for name, pieces, share in _RULES:
        values = [share(machine, rate) for rate in rates if rate.key[:2] in pieces]
        if values:
            found.append(name)
            value = statistics.median(values)
            if not 0 < value <= MOST:
                raise ConfigError(
                    f"--measured={path}: its rows give {name}={value:g}; expected above 0, at most "
                    f"{MOST:g}; check seconds and bytes of the rows {sorted(pieces)[0][0]!r}"
                )
            changed = dataclasses.replace(machine.efficiency, **{name: value})
            machine = dataclasses.replace(machine, efficiency=changed)
    if not found:
        raise ConfigError(f"--measured={path} has no row that the plan knows")
    return machine, tuple(found)


def _rate(row: dict[str, Any]) -> MeasuredRate:
    rate = MeasuredRate(**{**row, "shape": tuple(map(int, row["shape"]))})
    if not (0 < rate.seconds < 1e6 and min(rate.shape, default=0) > 0):
        raise ValueError(f"seconds={rate.seconds}, shape={rate.shape}")
    if not 0 <= rate.bytes < 1e18:
        raise ValueError(f"bytes={rate.bytes}")
    sizes = _SIZES.get(rate.piece.split(" ")[0])
    if rate.key[:2] in _KNOWN and sizes is not None and len(rate.shape) != sizes:
        raise ValueError(f"shape={rate.shape} of {rate.piece!r}, expected {sizes} numbers")
    return rate


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


def _matmul(rate: MeasuredRate) -> Matmul:
    """The product that was measured; shapes are rows, inputs, outputs, after that of experts."""
    work = rate.piece.split(" ", 1)[1]
    groups, rows, inputs, outputs = rate.shape if len(rate.shape) == 4 else (1, *rate.shape)
    if work == WEIGHTS:
        return Matmul(inputs * groups, rows / groups, outputs, groups, gradient=True)
    contraction, columns = (inputs, outputs) if work == FORWARD else (outputs, inputs)
    return Matmul(rows, contraction, columns, groups)


def _matmul_share(name: str) -> Share:
    def share(machine: Machine, rate: MeasuredRate) -> float:
        alone = dataclasses.replace(machine, communication_sms=0)
        predicted = alone.matmul_seconds(_matmul(rate), rate.recipe)
        return getattr(machine.efficiency, name) * predicted / rate.seconds

    return share


def _core_share(backward: bool) -> Share:
    def share(machine: Machine, rate: MeasuredRate) -> float:
        sequences, positions, heads, keys, values = rate.shape
        widths = 3 * keys + 2 * values if backward else keys + values
        flops = sequences * positions**2 * heads * widths
        return flops / rate.seconds / machine.peak("bfloat16")

    return share


def _bytes_share(machine: Machine, rate: MeasuredRate) -> float:
    return rate.bytes / rate.seconds / machine.chip.hbm_bytes_per_s


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
_RULES: tuple[tuple[str, frozenset[tuple[str, str]], Share], ...] = (
    *((name, _pieces(recipe, *each), _matmul_share(name)) for name, recipe, each in _MATMULS),
    ("attention_forward", _pieces("bfloat16", "attention forward"), _core_share(False)),
    ("attention_backward", _pieces("bfloat16", "attention backward"), _core_share(True)),
    ("quantise_forward", _pieces("fp8", "quantise rows"), _bytes_share),
    ("quantise_backward", _pieces("fp8", "quantise tokens", "quantise both"), _bytes_share),
)
_KNOWN = frozenset().union(*(pieces for _, pieces, _ in _RULES))
