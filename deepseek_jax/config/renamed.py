"""Keys that have other names than they once had."""

from collections.abc import Mapping
from typing import Any

# old -> new
RENAMED = {"layout.buffer": "layout.capacity_factor"}


def renamed(key: str) -> str:
    """A message that gives the new name of an old key; empty where there is none."""
    return f"{key} is now called {RENAMED[key]}" if key in RENAMED else ""


def with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an older `config.json` under today's names."""
    out = {name: dict(part) if isinstance(part, Mapping) else part for name, part in values.items()}
    for old, new in RENAMED.items():
        (section, name), (new_section, new_name) = old.split("."), new.split(".")
        if isinstance(out.get(section), dict) and name in out[section]:
            value = out[section].pop(name)
            out.setdefault(new_section, {}).setdefault(new_name, value)
    return out
