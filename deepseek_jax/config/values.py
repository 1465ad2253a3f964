"""Allowed range or choices of each config value by itself."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from deepseek_jax.config.hints import did_you_mean, need, shown
from deepseek_jax.config.schema import MESH_AXES, Config

_Range = tuple[str, Callable[[float], bool]]

_COUNT: _Range = ("at least 1", lambda x: x >= 1)

_POSITIVE: _Range = ("above 0", lambda x: x > 0)

_NOT_NEGATIVE: _Range = ("at least 0", lambda x: x >= 0)

_DEVICES: _Range = (
    "at least 1, or -1 for all that are left, and at most 65536",
    lambda x: x == -1 or 1 <= x <= 2**16,
)

_SECTIONS = ("join", "start", "compile", "first_step", "save", "evaluation", "end")


def _is_limit(x: float) -> bool:
    return x == 0 or 1e-3 <= x <= 1e6


# Every integer must be at least 1 and every other number above 0, except these. A float outside its
# range here trains nothing, or makes numbers that are not finite in float32.
_RANGES: dict[str, _Range] = {
    **dict.fromkeys((f"mesh.{axis}" for axis in MESH_AXES), _DEVICES),
    **dict.fromkeys(
        (
            "model.dense_layers", "model.q_latent", "model.shared_experts", "model.index_heads",
            "optimizer.weight_decay", "schedule.warmup_steps", "schedule.decay_start",
            "schedule.decay_end", "schedule.final_start", "schedule.bias_stop",
            "schedule.mtp_switch", "batch.ramp_tokens", "evaluation.tokens",
            "checkpoint.restarts",
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            "model.yarn_mscale", "model.yarn_mscale_all_dim", "schedule.bias_speed",
            "schedule.balance_alpha", "schedule.mtp_weight", "schedule.late_mtp_weight",
            "schedule.index_weight",
        ),
        ("at least 0 and at most 1000", lambda x: 0 <= x <= 1000),
    ),
    **dict.fromkeys(
        (f"deadlines.{name}" for name in _SECTIONS),
        ("from 1 to 604800, which is a week of seconds", lambda x: 1 <= x <= 604_800),
    ),
    "deadlines.step": ("from 0, which learns it, to 604800", lambda x: 0 <= x <= 604_800),
    "seed": ("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32),
    "layout.communication_sms": ("from 0 to 64", lambda x: 0 <= x <= 64),
    "model.rope_theta": ("above 1", lambda x: x > 1),
    "model.yarn_factor": ("at least 1, where 1 is off", lambda x: x >= 1),
    "model.mtp_depth": ("from 0 to 4", lambda x: 0 <= x <= 4),
    "model.routed_scale": ("above 0 and at most 1000", lambda x: 0 < x <= 1000),
    "model.swiglu_limit": ("0, which is off, or from 0.001 to 1e6", _is_limit),
    "model.norm_eps": ("above 0, from 1e-20 to 1", lambda x: 1e-20 <= x <= 1),
    "model.init_std": ("above 0, from 1e-12 to 100", lambda x: 1e-12 <= x <= 100),
    "optimizer.muon_momentum": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "optimizer.muon_rms": ("from 0.001 to 10", lambda x: 1e-3 <= x <= 10),
    "optimizer.b1": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "optimizer.b2": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "optimizer.eps": ("above 0, from 1e-20 to 1", lambda x: 1e-20 <= x <= 1),
    "optimizer.clip": ("above 0, from 1e-12 on", lambda x: x >= 1e-12),
    "optimizer.ema_decay": ("at least 0 and below 1, where 0 is off", lambda x: 0 <= x < 1),
    "anomaly.window": ("from 8 to 10,000", lambda x: 8 <= x <= 10_000),
    **dict.fromkeys(
        ("anomaly.loss_score", "anomaly.grad_norm_score"),
        ("0 for none, or from 3 to 1e6", lambda x: x == 0 or 3 <= x <= 1e6),
    ),
    "schedule.learning_rate": ("above 0, from 1e-12 on", lambda x: x >= 1e-12),
    "batch.length": ("at least 2: a token and the one after it", lambda x: x >= 2),
    "data.fim_rate": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "data.held_out": ("above 0 and below 1", lambda x: 0 < x < 1),
}  # fmt: skip

_CHOICES: dict[str, tuple[Any, ...]] = {
    "model.score": ("sigmoid", "softmax", "sqrtsoftplus"),
    "model.group_score": ("top2", "max"),
    "layout.zero": (0, 1, 3),
    "layout.dispatch": ("two_hop", "flat", "reference"),
    "layout.micro_batches_in_flight": (1, 2),
    "layout.pipeline": ("dualpipe", "dualpipev", "1f1b"),
    "layout.ramps": ("mask", "skip"),
    "layout.recompute": ("none", "full", "report", "attention"),
    "precision.recipe": ("float32", "bfloat16", "fp8"),
    "precision.scales": ("power_of_two", "free"),
    "precision.dispatch": ("compute", "fp8"),
    "precision.kernels": ("auto", "portable"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.decayed": ("matrices", "all"),
    "checkpoint.on_failure": ("stop", "continue"),
    "anomaly.rule": ("stop", "skip", "rewind"),
    "optimizer.moments": ("float32", "bfloat16"),
    "schedule.index_phase": ("warm_up", "sparse"),
}

_EMPTY_MEANS = ("data.path", "data.cache", "layout.cost_profile")  # keys where "" has a meaning

_LONGEST_TEXT = 4096  # bytes of a path on Linux

_SMALLEST = float(np.finfo(np.float32).tiny)  # 1.2e-38; hardware takes smaller ones for 0


def check_values(config: Config) -> None:
    """Checks each value by itself against its range or its choices.

    Raises:
      ConfigError: The first value outside; the message names the key and the bound that it broke.
    """
    for key, value in leaves(config):
        if key in _CHOICES:
            if value not in _CHOICES[key]:
                choices = ", ".join(map(str, _CHOICES[key]))
                hint = did_you_mean(value if isinstance(value, str) else "", _CHOICES[key])
                need(False, f"{key} is {shown(value)}; it must be one of {choices}{hint}")
        elif isinstance(value, str):
            _check_text(key, value)
        elif type(value) in (int, float):
            _check_number(key, value)


def _check_number(key: str, value: float) -> None:
    """Checks a number against its range, and against what float32 or int64 can hold."""
    words, holds = _RANGES.get(key, _COUNT if type(value) is int else _POSITIVE)
    found = f"{key} is {shown(value)}; it must be"
    need(not math.isnan(value) if type(value) is float else True, f"{found} a number, {words}")
    need(holds(value), f"{found} {words}")
    need(value < 2**63, f"{found} below 2**63, about 9.2e18")
    if type(value) is int:
        return
    need(
        value == 0 or value >= _SMALLEST,
        f"{found} at least 1.2e-38, because float32 takes a smaller number for 0",
    )
    below_one = holds(0.5) and not holds(1.0)
    need(
        not below_one or bool(np.float32(value) < 1),
        f"{found} at most 0.99999994, because float32 rounds it to 1",
    )


def _check_text(key: str, value: str) -> None:
    """Checks a string: a name or a path, which a message can show on one line."""
    found = f"{key} is {shown(value)}"
    if not value.strip():
        hint = " or ''" if key in _EMPTY_MEANS else ""
        need(
            not value and key in _EMPTY_MEANS,
            f"{found}, and nothing in it can be seen; give a name or a path{hint}",
        )
    need(
        len(value) <= _LONGEST_TEXT,
        f"{found} of {len(value)} characters; it must have at most {_LONGEST_TEXT}",
    )
    need(
        not any(ord(letter) < 32 or ord(letter) == 127 for letter in value),
        f"{found} and has a control character; give a name or a path without one",
    )
    need(
        not any(0xD800 <= ord(letter) < 0xE000 for letter in value),
        f"{found} and has bytes that are not UTF-8; give a name or a path in UTF-8",
    )


def leaves(section: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Yields dotted key and value of every setting that is not a section."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{path}{field.name}.")
        else:
            yield path + field.name, value
