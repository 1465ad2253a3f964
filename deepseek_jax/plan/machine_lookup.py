"""Machine of `--hardware`: a known one by its name, or a user's by its file."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.config import Config, ConfigError
from deepseek_jax.config.hints import did_you_mean, name_shown, need, shown
from deepseek_jax.hardware import machine_file
from deepseek_jax.hardware.chips import CHIPS
from deepseek_jax.hardware.efficiency import Efficiency, efficiency
from deepseek_jax.hardware.network import NETWORKS
from deepseek_jax.plan.machine import Machine

_SHARES = {field.name for field in dataclasses.fields(Efficiency)}
_SHARE = (1e-4, 1.0)
_OTHERS = {
    "synchronisation_s": (1e-12, 1.0),  # seconds
    "half_contraction_fp8": (1e-3, 1e6),  # numbers that a product sums
    "half_contraction_bf16": (1e-3, 1e6),
}


def find(name: str, price: float | None = None) -> Machine:
    """Looks up a machine.

    Args:
      name: "h800" and other names of `hardware/chips.py`, or the path of a TOML file.
      price: Dollars of a device for an hour, instead of the machine's own.

    Raises:
      ConfigError: No such machine; the message names the closest one. Or a fault in the file.
    """
    if name.endswith(".toml") or "/" in name:
        chip, network, changed = machine_file.load(Path(name).expanduser())
        base = efficiency(chip.name)
        try:
            share = dataclasses.replace(base, **_checked(changed))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    else:
        key = name.lower()
        if key not in CHIPS:
            if "," in name:
                raise ConfigError(
                    f"--hardware={name_shown(name)}: name one machine; --compare takes several"
                )
            raise ConfigError(
                f"--hardware={name_shown(name)} is not known{did_you_mean(key, CHIPS)}; name one "
                f"of {', '.join(CHIPS)}, or a file such as docs/data/my_cluster.toml"
            )
        chip, network, share = CHIPS[key], NETWORKS[key], efficiency(key)
    if price is not None:
        chip = dataclasses.replace(chip, dollars_per_hour=price)
    return Machine(chip, network, share)


def with_messages(machine: Machine, config: Config) -> Machine:
    """The machine with the multiprocessors that this config leaves to messages."""
    over = config.layout.rules.get("experts", ())
    several = any(getattr(config.mesh, axis) > 1 for axis in over)
    sms = config.layout.communication_sms if several else 0
    return dataclasses.replace(machine, communication_sms=min(sms, machine.chip.sms - 1))


def _checked(table: Mapping[str, Any]) -> dict[str, float]:
    """The table [efficiency] of a machine's file."""
    for key, value in table.items():
        path = f"efficiency.{name_shown(key)}"
        need(key in _SHARES, f"unknown key {path}{did_you_mean(key, _SHARES)}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        least, most = _OTHERS.get(key, _SHARE)
        need(
            number and least <= value <= most,
            f"{path}={shown(value)}; expected a number above 0, at least {least:g} and "
            f"at most {most:g}",
        )
    return {key: float(value) for key, value in table.items()}
