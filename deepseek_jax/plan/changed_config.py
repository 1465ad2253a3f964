"""Configs with a few other values, and whether they are ones that a run would accept."""

import dataclasses
from typing import Any

from deepseek_jax.config import Config, ConfigError, check


def replace(config: Config, section: str, **values: Any) -> Config:
    """The config with some values of one section changed."""
    changed = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: changed})


def is_accepted(config: Config) -> bool:
    """Whether the config passes the checks of a run."""
    try:
        check(config)
    except ConfigError:
        return False
    return True
