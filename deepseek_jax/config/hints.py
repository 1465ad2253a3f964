"""What messages of the config's checks share."""

import difflib
from collections.abc import Iterable

from deepseek_jax.config.schema import ConfigError


def need(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
