"""Parser: a ConfigDict or a `config.json` to a checked `Config`."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.config.renamed import renamed, with_new_names
from deepseek_jax.config.rules import (
    check_batch,
    check_dispatch,
    check_layout,
    check_model,
    check_optimizer,
    check_pipeline,
    check_schedule,
    check_splits,
)
from deepseek_jax.config.schema import Config, ConfigError
from deepseek_jax.config.values import check_values


def parse(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Builds a checked `Config` from a ConfigDict or a dictionary of the same keys.

    Raises:
      ConfigError: An unknown or missing key, a value of the wrong type, or values that cannot work
        together; every message names the key.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    parsed = _build(Config, values, "")
    check(parsed)
    return parsed


def from_json(text: str) -> Config:
    """`parse_saved` for the text of a `config.json`."""
    return parse_saved(json.loads(text))


def parse_saved(values: Mapping[str, Any]) -> Config:
    """`parse` for the dictionary of a `config.json`, which may have keys under earlier names."""
    return parse(with_new_names(values))


def check(config: Config) -> None:
    """Checks every value and every rule between values.

    The number of devices is not known here: rules that need the size of a mesh axis of -1 are
    skipped, and `parallel/mesh.py` checks again once that size is known.

    Raises:
      ConfigError: The first rule that fails. A message that ends in "set key=value" gives the
        nearest value that this rule accepts.
    """
    check_values(config)
    check_model(config)
    check_optimizer(config)
    check_schedule(config)
    check_layout(config)
    check_batch(config)
    check_splits(config)
    check_dispatch(config)
    check_pipeline(config)


def _build(cls: type, values: Any, path: str) -> Any:
    """Frozen dataclass `cls` from a dictionary with exactly its keys; `path` is its dotted key."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'config'} is {values!r}; expected a section with keys")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    dot = f"{path}." if path else ""
    for key in values:
        if key not in fields:
            if message := renamed(dot + str(key)):
                raise ConfigError(f"{message}; docs/config.md lists renamed keys")
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {dot}{near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"unknown key {dot}{key}; {hint}")
    if missing := [key for key in fields if key not in values]:
        raise ConfigError(f"missing key {dot}{missing[0]}; configs/v3_671b.py has every key")
    return cls(**{key: _value(fields[key].type, values[key], dot + key) for key in fields})


def _value(kind: Any, value: Any, key: str) -> Any:
    """`value` as the type of a field, refused where conversion would change it."""
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, key)  # type: ignore[arg-type]
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float, str, bool):
        if type(value) is not kind:
            raise ConfigError(f"{key} is {value!r}; expected {kind.__name__}")
        return value
    if kind == tuple[int, ...]:
        numbers = tuple(value) if isinstance(value, tuple | list) else None
        if numbers is None or not all(type(number) is int for number in numbers):
            raise ConfigError(f"{key} is {value!r}; expected integers, such as (4, 4, 3)")
        return numbers
    # layout.rules is the only field that is a table.
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {value!r}; expected a table of logical axis -> mesh axes")
    return {axis: _mesh_axes(over, f"{key}.{axis}") for axis, over in value.items()}


def _mesh_axes(value: Any, key: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{key} is {value!r}; expected names of mesh axes, such as ('node', 'gpu')"
        )
    return tuple(names)
