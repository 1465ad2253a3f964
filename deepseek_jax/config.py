"""What a run is: one ConfigDict in, frozen dataclasses checked as a whole out.

`parse` is the only way in. It names the key to change in every message, and runs before anything is
compiled or written. Numbers and their sources are in `configs/v3_671b.py`; nothing here has a default.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


class ConfigError(ValueError):
    """The config cannot work; the message names the key and what would."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and rules of the model, section 2 of the report; widths in numbers, not bytes."""

    vocab: int
    layers: int
    dense_layers: int
    d_model: int
    d_dense: int
    heads: int
    q_latent: int
    kv_latent: int
    d_nope: int
    d_rope: int
    d_value: int
    rope_theta: float
    yarn_factor: float
    yarn_original: int
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_mscale: float
    yarn_mscale_all_dim: float
    experts: int
    shared_experts: int
    top_k: int
    groups: int
    top_groups: int
    d_expert: int
    score: str
    group_score: str
    normalise_weights: bool
    routed_scale: float
    mtp_depth: int
    norm_eps: float
    init_std: float

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def d_shared(self) -> int:
        """Width of the shared experts, which are one feed-forward network."""
        return self.shared_experts * self.d_expert


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis, outermost first; at most one may be -1: all that are left."""

    pipe: int
    replica: int
    node: int
    gpu: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    """Where things live and what is kept: results never depend on it."""

    zero: int
    dispatch: str
    recompute: str
    attention_block: int
    loss_chunk: int
    rules: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    recipe: str


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    b1: float
    b2: float
    eps: float
    weight_decay: float
    decayed: str
    clip: float
    moments: str
    ema_decay: float


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Every boundary is a number of consumed tokens, except `warmup_steps`."""

    tokens: int
    learning_rate: float
    warmup_steps: int
    decay_start: int
    decay_end: int
    decayed_learning_rate: float
    final_start: int
    final_learning_rate: float
    bias_speed: float
    bias_stop: int
    balance_alpha: float
    mtp_weight: float
    late_mtp_weight: float
    mtp_switch: int


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Sequences of `length` tokens per optimiser step, in micro-batches, over all devices."""

    length: int
    sequences: int
    ramp_sequences: int
    ramp_tokens: int
    micro_sequences: int


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str
    tokenizer: str
    text_key: str
    cache: str
    fim_rate: float
    held_out: float


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int
    keep: int


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every_steps: int


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    tokens: int


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int
    model: ModelConfig
    mesh: MeshConfig
    layout: LayoutConfig
    precision: PrecisionConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    batch: BatchConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    evaluation: EvaluationConfig

    def to_json(self) -> str:
        """The resolved config, as `config.json` keeps it; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def parse(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Turns a ConfigDict (or the dictionary in a `config.json`) into a checked `Config`.

    Raises:
      ConfigError: an unknown or missing key, a value of the wrong type, or values that cannot work
        together; every message names the key.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    parsed = _build(Config, values, "")
    check(parsed)
    return parsed


def from_json(text: str) -> Config:
    return parse(json.loads(text))


def check(config: Config) -> None:
    """Every rule between the values of one config. Devices come later: `parallel/mesh.py`."""


def _build(cls: type, values: Any, path: str) -> Any:
    """A frozen dataclass from a dictionary with exactly its keys."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'config'} is {values!r}; expected a section with keys")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    dot = f"{path}." if path else ""
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {dot}{near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"unknown key {dot}{key}; {hint}")
    if missing := [key for key in fields if key not in values]:
        raise ConfigError(f"missing key {dot}{missing[0]}; configs/v3_671b.py has every key")
    return cls(**{key: _value(fields[key].type, values[key], dot + key) for key in fields})


def _value(kind: Any, value: Any, key: str) -> Any:
    """`value` as the type a field asks for, without a silent change of meaning."""
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
    # The one field that is a table: layout.rules.
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {value!r}; expected logical axis -> mesh axes")
    return {axis: (mesh,) if isinstance(mesh, str) else tuple(mesh) for axis, mesh in value.items()}
