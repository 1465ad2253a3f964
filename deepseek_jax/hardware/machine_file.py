"""Machine of a user, described in a TOML file by its differences from a known one.

    base = "h100"                    # the machine that it resembles; all else is optional
    dollars_per_hour = 1.9
    infiniband_bytes_per_s = 25e9    # any field of `Chip` and `Network`, in the unit of its name
    [peak_flops_per_s]
    bfloat16 = 800e12
    [efficiency]                     # handed on as it is

A measured ("effective") bandwidth of the base is dropped where the file changes the rated one and
does not state it, and so are the published exchanges of tokens where any link is changed.
"""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import did_you_mean, name_shown, need, one_line, shown
from deepseek_jax.hardware.chips import CHIPS, Chip
from deepseek_jax.hardware.network import NETWORKS, Network

_CHIP = {field.name for field in dataclasses.fields(Chip)} - {"name", "peak_flops_per_s"}
_NETWORK = {field.name for field in dataclasses.fields(Network)} - {"name", "all_to_all"}
_INTEGERS = {
    field.name
    for kind in (Chip, Network)
    for field in dataclasses.fields(kind)
    if field.type in (int, "int")
}
_LINKS = ("nvlink", "infiniband")
_TABLES = ("peak_flops_per_s", "efficiency")
_KEYS = ("base", "name", *sorted(_CHIP | _NETWORK), *_TABLES)

# Lowest value of a key that can be meant in its unit, and the unit that a lower one is likely in.
_LOWEST = {
    "hbm_bytes": (1e9, "bytes, not GB"),
    "hbm_bytes_per_s": (1e9, "bytes/s, not GB/s"),
    "l2_bytes": (1e5, "bytes, not MB"),
    "shared_bytes_per_sm": (1e3, "bytes, not KB"),
    **{key: (1e7, "bytes/s, not GB/s") for key in _NETWORK if key.endswith("bytes_per_s")},
}
_LOWEST_PEAK = {"float64": 1e10}
_LONGEST_LATENCY = 0.01  # seconds


class MachineFile(NamedTuple):
    """Machine of a file.

    Attributes:
      chip, network: The base's with the file's values; both have the file's name for the machine.
      efficiency: The table of that name, not checked; empty if there is none.
    """

    chip: Chip
    network: Network
    efficiency: Mapping[str, Any]


def load(path: Path | str) -> MachineFile:
    """Reads a machine; without a `name` it has that of the file.

    Raises:
      ConfigError: A file that cannot be read, an unknown key or base, or a value of a wrong type or
        unit; the message names the file and the key.
    """
    file, values = one_line(path), _read(Path(path))
    try:
        return _machine(values, Path(path).stem)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{one_line(path)} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{one_line(path)} is not TOML: {one_line(error, 120)}") from error


def _machine(values: Mapping[str, Any], stem: str) -> MachineFile:
    for key in values:
        need(key in _KEYS, f"unknown key {name_shown(key)}{did_you_mean(key, _KEYS)}")
    known = ", ".join(CHIPS)
    need("base" in values, f'base is missing; set base = "h100" or another of {known}')
    base, name = values["base"], values.get("name", stem)
    if not isinstance(base, str) or base.lower() not in CHIPS:
        close = did_you_mean(str(base).lower(), CHIPS) or f"; known: {known}"
        raise ConfigError(f"base is {shown(base)}, which is not a known machine{close}")
    good = isinstance(name, str) and name.strip() != "" and name.isprintable()
    need(good, f"name is {shown(name)}; expected a text of printable characters")
    for key in _TABLES:
        table = values.get(key, {})
        need(isinstance(table, dict), f"{key} is {shown(table)}; expected a table, [{key}]")
    chip, network = CHIPS[base.lower()], NETWORKS[base.lower()]
    numbers: dict[str, Any] = {
        key: _number(key, values[key]) for key in values if key in _CHIP | _NETWORK
    }
    peaks = _peaks(values.get("peak_flops_per_s", {}))
    chip = dataclasses.replace(
        chip,
        name=name,
        peak_flops_per_s={**chip.peak_flops_per_s, **peaks},
        **{key: number for key, number in numbers.items() if key in _CHIP},
    )
    network = _links(network, {key: numbers[key] for key in numbers if key in _NETWORK}, name)
    return MachineFile(chip, network, values.get("efficiency", {}))


def _links(base: Network, numbers: Mapping[str, Any], name: str) -> Network:
    """The network with its changes, and without the measurements that they make void."""
    void: dict[str, Any] = {"all_to_all": ()} if numbers else {}
    for link in _LINKS:
        if f"{link}_bytes_per_s" in numbers:
            kept = _NETWORK & {f"{link}_effective_bytes_per_s", f"{link}_small_bytes_per_s"}
            void |= dict.fromkeys(kept)
    network = dataclasses.replace(base, name=name, **void | dict(numbers))
    for link in _LINKS:
        rated = getattr(network, f"{link}_bytes_per_s")
        for kind in ("effective", "small"):
            key = f"{link}_{kind}_bytes_per_s"
            measured = getattr(network, key, None) or 0
            need(measured <= rated, f"{key}={measured:g} is above {link}_bytes_per_s={rated:g}")
    slow, fast = network.infiniband_bytes_per_s, network.nvlink_bytes_per_s
    need(
        slow <= fast,
        f"infiniband_bytes_per_s={slow:g} is above nvlink_bytes_per_s={fast:g}; 400 Gb/s are 50e9",
    )
    return network


def _peaks(table: Mapping[str, Any]) -> dict[str, float]:
    """Peaks of the file, FLOP/s by dtype."""
    known = sorted({dtype for chip in CHIPS.values() for dtype in chip.peak_flops_per_s})
    found = {}
    for dtype, value in table.items():
        key = f"peak_flops_per_s.{name_shown(dtype)}"
        need(dtype not in _KEYS, f"{key} is no dtype; keys of the machine stand above all tables")
        need(dtype in known, f"unknown key {key}{did_you_mean(dtype, known)}")
        found[dtype] = float(_positive(key, value))
        lowest = _LOWEST_PEAK.get(dtype, 1e12)
        need(
            found[dtype] >= lowest,
            f"{key}={shown(value)} is below {lowest:g}; did you mean FLOP/s, not TFLOP/s?",
        )
    return found


def _number(key: str, value: Any) -> float | int:
    """A field of `Chip` or `Network` in its unit."""
    number = _positive(key, value)
    lowest, unit = _LOWEST.get(key, (0.0, ""))
    need(number >= lowest, f"{key}={shown(value)} is below {lowest:g}; did you mean {unit}?")
    if key.endswith("latency_s"):
        need(
            number <= _LONGEST_LATENCY,
            f"{key}={shown(value)} is above {_LONGEST_LATENCY:g}; did you mean seconds, not us?",
        )
    if key in _INTEGERS:
        need(number == int(number), f"{key}={shown(value)} is not a whole number")
        return int(number)
    return float(number)


def _positive(key: str, value: Any) -> float | int:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    need(number, f"{key} is {shown(value)}; expected a number")
    need(
        0 < value < 1e30 and math.isfinite(value),
        f"{key}={shown(value)}; expected a number above 0",
    )
    return value
