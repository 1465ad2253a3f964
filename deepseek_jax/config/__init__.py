"""The config of a run: one ConfigDict in, frozen dataclasses checked as a whole out."""

from deepseek_jax.config.capacity import buffer_slots, most_nodes
from deepseek_jax.config.parse import check, from_json, load_json, parse, parse_saved
from deepseek_jax.config.renamed import RENAMED, renamed
from deepseek_jax.config.rules import check_blocks
from deepseek_jax.config.schema import (
    DATA_AXES,
    LOGICAL_AXES,
    MESH_AXES,
    SPLITS,
    AnomalyConfig,
    BatchConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    DeadlineConfig,
    EvaluationConfig,
    LayoutConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
)
from deepseek_jax.config.stages import layers_per_stage, stage_count

__all__ = [
    "DATA_AXES",
    "LOGICAL_AXES",
    "MESH_AXES",
    "RENAMED",
    "SPLITS",
    "AnomalyConfig",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DeadlineConfig",
    "EvaluationConfig",
    "LayoutConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "ScheduleConfig",
    "buffer_slots",
    "check",
    "check_blocks",
    "from_json",
    "layers_per_stage",
    "load_json",
    "most_nodes",
    "parse",
    "parse_saved",
    "renamed",
    "stage_count",
]
