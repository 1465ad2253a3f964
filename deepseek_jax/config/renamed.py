"""Config keys that were renamed or added since a `config.json` was written."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.config.schema import ConfigError

# old -> new
RENAMED = {"layout.buffer": "layout.capacity_factor"}
# key -> what a run computed with before there was the key
ADDED = {
    "model.swiglu_limit": 0.0,
    "optimizer.name": "adamw",
    "optimizer.muon_momentum": 0.95,
    "optimizer.muon_rms": 0.2,
    "precision.scales": "power_of_two",
    "precision.kernels": "portable",
    "layout.communication_sms": 20,
    "model.index_heads": 0,
    "model.index_width": 128,
    "model.index_top_k": 2048,
    "schedule.index_phase": "sparse",
    "schedule.index_weight": 0.0,
    "checkpoint.on_failure": "stop",
    "checkpoint.restarts": 5,
    "anomaly.rule": "stop",
    "anomaly.window": 128,
    "anomaly.loss_score": 0.0,
    "anomaly.grad_norm_score": 0.0,
    "anomaly.most": 8,
    "deadlines.join": 300,
    "deadlines.start": 3600,
    "deadlines.compile": 3600,
    "deadlines.first_step": 1800,
    "deadlines.step": 0,
    "deadlines.save": 1800,
    "deadlines.evaluation": 3600,
    "deadlines.end": 600,
}
# Sections of which every key is an added one.
NEW_SECTIONS = ("anomaly", "deadlines")


def renamed(key: str) -> str:
    """Message with the new name of a renamed key; empty for any other key."""
    return f"{key} is now called {RENAMED[key]}" if key in RENAMED else ""


def with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a `config.json`, with renamed keys under their new names, and with added keys.

    Raises:
      ConfigError: a key is there under both names.
    """
    out = {name: dict(part) if isinstance(part, Mapping) else part for name, part in values.items()}
    for old, new in RENAMED.items():
        (section, name), (new_section, new_name) = old.split("."), new.split(".")
        if isinstance(out.get(section), dict) and name in out[section]:
            value = out[section].pop(name)
            held = out.setdefault(new_section, {})
            if not isinstance(held, dict):
                continue  # refused as no section by `parse`
            if new_name in held:
                raise ConfigError(f"{renamed(old)}, and config.json has both; remove {old}")
            held[new_name] = value
    for section in NEW_SECTIONS:
        out.setdefault(section, {})
    for key, value in ADDED.items():
        section, name = key.split(".")
        if isinstance(out.get(section), dict):
            out[section].setdefault(name, value)
    return out
