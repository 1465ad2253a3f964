"""Parser: a ConfigDict or a `config.json` to a checked `Config`."""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from deepseek_jax.config.hints import name_shown, shown
from deepseek_jax.config.renamed import renamed, with_new_names
from deepseek_jax.config.rules import (
    check_batch,
    check_dispatch,
    check_indexer,
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
    _refuse_renamed(values)
    parsed = _build(Config, values, "")
    check(parsed)
    return parsed


def from_json(text: str) -> Config:
    """`parse_saved` for the text of a `config.json`."""
    return parse_saved(load_json(text, "config.json"))


def load_json(text: str, source: str) -> dict[str, Any]:
    """The object in the text of a JSON file.

    Args:
      source: path of the file, for messages.

    Raises:
      ConfigError: No JSON, another value than an object, or a key that is there twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        held = dict(pairs)
        if len(held) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {name_shown(twice)} is there twice")
        return held

    try:
        values = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        why = "too deeply nested" if isinstance(error, RecursionError) else str(error)[:100]
        raise ConfigError(f"{source} is not readable JSON ({why})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds {shown(values)}; expected an object of keys")
    return values


def parse_saved(values: Mapping[str, Any]) -> Config:
    """`parse` for the dictionary of a `config.json`, which may have keys under earlier names."""
    return parse(with_new_names(values) if isinstance(values, Mapping) else values)


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
    check_indexer(config)
    check_optimizer(config)
    check_schedule(config)
    check_layout(config)
    check_batch(config)
    check_splits(config)
    check_dispatch(config)
    check_pipeline(config)


def _refuse_renamed(values: Any) -> None:
    """Raises ConfigError for a renamed key, before others that the same old config lacks."""
    sections = values.items() if isinstance(values, Mapping) else ()
    for section, held in sections:
        for key in held if isinstance(held, Mapping) else ():
            if message := renamed(f"{section}.{key}"):
                raise ConfigError(f"{message}; docs/config.md lists renamed keys")


def _build(cls: type, values: Any, path: str) -> Any:
    """Frozen dataclass `cls` from a dictionary with exactly its keys; `path` is its dotted key."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'config'} is {shown(values)}; expected a section with keys")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    dot = f"{path}." if path else ""
    for key in values:
        if key not in fields:
            name = name_shown(key)
            near = difflib.get_close_matches(name, fields, n=1)
            hint = (
                f"did you mean {dot}{near[0]}?" if near else f"{path or 'a config'} has no such key"
            )
            raise ConfigError(f"unknown key {dot}{name}; {hint}")
    held = {
        key: _value(field.type, values[key], dot + key)
        for key, field in fields.items()
        if key in values
    }  # before a missing section, so that a renamed key in another one is told
    if missing := [key for key in fields if key not in values]:
        raise ConfigError(f"missing key {dot}{missing[0]}; configs/v3_671b.py has every key")
    return cls(**held)


def _value(kind: Any, value: Any, key: str) -> Any:
    """`value` as the type of a field, refused where conversion would change it."""
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, key)  # type: ignore[arg-type]
    if kind in (int, float, str, bool):
        exact = _exactly(kind, value)
        if exact is None:
            raise ConfigError(f"{key} is {shown(value)}; expected {kind.__name__}")
        return exact
    if kind == tuple[int, ...]:
        held = value if isinstance(value, tuple | list) else [None]
        numbers = tuple(_exactly(int, number) for number in held)
        if None in numbers:
            raise ConfigError(f"{key} is {shown(value)}; expected integers, such as (4, 4, 3)")
        return numbers
    # layout.rules is the only field that is a table.
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {shown(value)}; expected a table of logical axis -> mesh axes")
    return {name: _mesh_axes(over, f"{key}.{name_shown(name)}") for name, over in value.items()}


def _exactly(kind: type, value: Any) -> Any:
    """`value` as exactly the same bool, int, float or str; None where there is none."""
    if isinstance(value, np.generic):
        value = value.item()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int and is_number:
        return int(value) if isinstance(value, int) or value.is_integer() else None
    if kind is float and is_number:
        try:
            return float(value) + 0.0  # which makes -0.0 to 0.0
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if kind is str and isinstance(value, str):
        return str(value)
    return value if kind is bool and isinstance(value, bool) else None


def _mesh_axes(value: Any, key: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{key} is {shown(value)}; expected names of mesh axes, such as ('node', 'gpu')"
        )
    return tuple(map(str, names))
