"""Config keys that do not exist, named with the nearest one that does."""

import dataclasses
import difflib
import re
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.config import RENAMED, Config, ConfigError, renamed


def no_such_key(error: Exception) -> str:
    """Message for a ConfigDict's error about an unknown key, with the nearest key that exists."""
    # Setting says 'Key "NAME" does not exist', reading "'NAME'" alone.
    found = re.search(r"""Key \W?["'](\w+)|^\W*["'](\w+)\W*$""", str(error))
    if not found:
        return f"{type(error).__name__}: {error}"
    name = found[1] or found[2]
    for old in RENAMED:
        if old.endswith(f".{name}"):
            return renamed(old)
    sections = [field.type for field in dataclasses.fields(Config)]
    parts = [part for part in sections if dataclasses.is_dataclass(part)]
    known = sorted({field.name for part in parts for field in dataclasses.fields(part)})
    near = difflib.get_close_matches(name, known, n=1)
    return f"there is no key {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def check(config: ConfigDict, key: str) -> None:
    """Raises ConfigError unless `config` has a value under `key`, as "model.layers"."""
    here: Any = config
    *sections, last = key.split(".")
    for depth, part in enumerate([*sections, last]):
        if not isinstance(here, ConfigDict) or part not in here:
            known = list(here.keys()) if isinstance(here, ConfigDict) else []
            if message := renamed(key):
                raise ConfigError(f"--config.{message}")
            if not known:
                above = ".".join(["--config", *sections[:depth]])
                what = "is one value" if depth else "has no keys at all"
                raise ConfigError(f"unknown key --config.{key}; {above} {what}")
            near = difflib.get_close_matches(part, known, n=1)
            path = ".".join([*sections[:depth], near[0]]) if near else ", ".join(known)
            hint = f"did you mean --config.{path}?" if near else f"known here: {path}"
            raise ConfigError(f"unknown key --config.{key}; {hint}")
        here = here[part]
    if isinstance(here, ConfigDict):
        raise ConfigError(f"--config.{key} is a section; set one of {', '.join(here.keys())}")
