"""Helpers of the config's error messages."""

import difflib
from collections.abc import Iterable

from deepseek_jax.config.schema import ConfigError


def need(holds: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `holds`."""
    if not holds:
        raise ConfigError(message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Question with the known name nearest to `name`, to end a message; empty if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
