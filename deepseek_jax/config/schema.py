"""What a run is: one ConfigDict in, frozen dataclasses checked as a whole out.

`parse` is the only way in. It names the key to change in every message, and runs before anything
is compiled or written. Numbers and their sources are in `configs/v3_671b.py`; nothing here has a
default.
"""

import dataclasses
import json
from collections.abc import Mapping


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


MESH_AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))  # outermost first

DATA_AXES = ("replica", "node", "gpu")  # along these, devices see different tokens

# The logical axes that a parameter or an activation may carry, each with the mesh axes that a rule
# may split it over: those for which the model has the collectives that give the same result.
SPLITS: dict[str, tuple[str, ...]] = {
    "batch": DATA_AXES,
    "layer": (),
    "model": (),
    "vocab": ("gpu", "tensor"),
    "heads": ("tensor",),
    "q_latent": (),
    "kv_latent": (),
    "head_width": (),
    "dense_width": ("gpu", "tensor"),
    "expert_width": ("tensor",),
    "experts": DATA_AXES,
}

LOGICAL_AXES = tuple(SPLITS)


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    """Where things live and what is kept: results never depend on it."""

    zero: int
    dispatch: str
    capacity_factor: float
    micro_batches_in_flight: int
    pipeline: str
    stage_layers: tuple[int, ...]
    ramps: str
    defer_weight_gradients: bool
    cost_profile: str
    recompute: str
    attention_block: int
    unroll: int
    loss_chunk: int
    rules: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    recipe: str
    dispatch: str


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
