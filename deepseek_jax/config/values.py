"""Allowed range or choices of each config value by itself."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from deepseek_jax.config.hints import did_you_mean, need
from deepseek_jax.config.schema import MESH_AXES, Config

_Range = tuple[str, Callable[[float], bool]]

_COUNT: _Range = ("at least 1", lambda x: x >= 1)

_POSITIVE: _Range = ("above 0", lambda x: x > 0)

_DEVICES: _Range = ("at least 1, or -1 for all that are left", lambda x: x == -1 or x >= 1)

# Every integer must be at least 1 and every other number above 0, except these.
_RANGES: dict[str, _Range] = {
    **dict.fromkeys((f"mesh.{axis}" for axis in MESH_AXES), _DEVICES),
    **dict.fromkeys(
        (
            "model.dense_layers", "model.q_latent", "model.shared_experts", "model.yarn_mscale",
            "model.yarn_mscale_all_dim", "optimizer.weight_decay", "schedule.warmup_steps",
            "schedule.decay_start", "schedule.decay_end", "schedule.final_start",
            "schedule.bias_speed", "schedule.bias_stop", "schedule.balance_alpha",
            "schedule.mtp_weight", "schedule.late_mtp_weight", "schedule.mtp_switch",
            "batch.ramp_tokens", "evaluation.tokens",
        ),
        ("at least 0", lambda x: x >= 0),
    ),
    "seed": ("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32),
    "model.yarn_factor": ("at least 1, where 1 is off", lambda x: x >= 1),
    "model.mtp_depth": ("from 0 to 4", lambda x: 0 <= x <= 4),
    "optimizer.b1": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "optimizer.b2": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "optimizer.ema_decay": ("at least 0 and below 1, where 0 is off", lambda x: 0 <= x < 1),
    "batch.length": ("at least 2: a token and the one after it", lambda x: x >= 2),
    "data.fim_rate": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "data.held_out": ("above 0 and below 1", lambda x: 0 < x < 1),
}  # fmt: skip

_CHOICES: dict[str, tuple[Any, ...]] = {
    "model.score": ("sigmoid", "softmax"),
    "model.group_score": ("top2", "max"),
    "layout.zero": (0, 1, 3),
    "layout.dispatch": ("two_hop", "flat", "reference"),
    "layout.micro_batches_in_flight": (1, 2),
    "layout.pipeline": ("dualpipe", "dualpipev", "1f1b"),
    "layout.ramps": ("mask", "skip"),
    "layout.recompute": ("none", "full", "report"),
    "precision.recipe": ("float32", "bfloat16"),
    "precision.dispatch": ("compute", "fp8"),
    "optimizer.decayed": ("matrices", "all"),
    "optimizer.moments": ("float32", "bfloat16"),
}


def check_values(config: Config) -> None:
    """Checks each value by itself against its range or its choices.

    Raises:
      ConfigError: The first value outside; the message names the key and what is allowed.
    """
    for key, value in leaves(config):
        if key in _CHOICES:
            choices = ", ".join(map(str, _CHOICES[key]))
            hint = did_you_mean(str(value), map(str, _CHOICES[key]))
            need(value in _CHOICES[key], f"{key} is {value!r}; it must be one of {choices}{hint}")
        elif type(value) in (int, float):
            words, holds = _RANGES.get(key, _COUNT if type(value) is int else _POSITIVE)
            finite = abs(value) < 2**63  # false for NaN as well
            need(finite and holds(value), f"{key} is {value}; it must be {words}")


def leaves(section: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Yields dotted key and value of every setting that is not a section."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{path}{field.name}.")
        else:
            yield path + field.name, value
