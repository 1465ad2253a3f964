"""Settings that a published checkpoint runs with when no config file is given.

Model sizes and the dtype come from its config.json. The rest is stated here and chooses no recipe:
no quantised dispatch, no recomputation, and a layout that is right for one device or any mesh.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.config import (
    AnomalyConfig,
    BatchConfig,
    CheckpointConfig,
    Config,
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

RECIPES = ("float32", "bfloat16")  # the stated dtypes that are computed in as they are


def stated_recipe(settings: Mapping[str, Any], source: Path) -> str:
    """Name of the precision recipe for the dtype that the settings of `source` state.

    A checkpoint in FP8 blocks is computed in bfloat16, as its authors' code does. No recipe
    computes in float16, and bfloat16 would drop three bits of each significand. So float16, or a
    dtype that is missing or unknown, means float32, which holds every stored value; a warning says
    so.
    """
    if settings.get("quantization_config"):
        return "bfloat16"
    stated = settings.get("dtype") or settings.get("torch_dtype")  # `dtype` is the newer name
    name = str(stated).removeprefix("torch.")
    if name in RECIPES:
        return name
    if jax.process_index() == 0:
        found = "states no dtype" if stated is None else f"states dtype {stated!r}"
        warnings.warn(f"{source} {found}; computing in float32", stacklevel=2)
    return "float32"


def stated_scales(settings: Mapping[str, Any]) -> str:
    """The value of `precision.scales` for a checkpoint that is computed in FP8.

    Published code makes scales of activations as those of weights were made: powers of two where
    `scale_fmt` is "ue8m0" (V3.1), else any (V3, R1).
    """
    quantised = settings.get("quantization_config") or {}
    return "power_of_two" if quantised.get("scale_fmt") == "ue8m0" else "free"


def inference_config(model: ModelConfig, recipe: str, scales: str) -> Config:
    """Config of a forward pass of this model on one device; a mesh is set by `forward_config`.

    Args:
      recipe, scales: `precision.recipe` and `precision.scales`.
    """
    return Config(
        seed=0,
        model=model,
        mesh=MeshConfig(pipe=1, replica=1, node=1, gpu=1, tensor=1),
        layout=_layout(model),
        precision=PrecisionConfig(recipe=recipe, scales=scales, dispatch="compute", kernels="auto"),
        batch=BatchConfig(
            length=1024, sequences=8, ramp_sequences=8, ramp_tokens=0, micro_sequences=8
        ),
        # A forward pass reads none of the sections below; their values only pass the checks.
        optimizer=OptimizerConfig(
            name="adamw", muon_momentum=0.95, muon_rms=0.2, b1=0.9, b2=0.95, eps=1e-8,
            weight_decay=0.0, decayed="matrices", clip=1.0, moments="float32", ema_decay=0.0,
        ),
        schedule=ScheduleConfig(
            tokens=1, learning_rate=1e-4, warmup_steps=0, decay_start=0, decay_end=0,
            decayed_learning_rate=1e-4, final_start=0, final_learning_rate=1e-4, bias_speed=0.0,
            bias_stop=0, balance_alpha=0.0, mtp_weight=0.0, late_mtp_weight=0.0, mtp_switch=0,
            index_phase="sparse", index_weight=0.0,
        ),
        data=DataConfig(
            path="", tokenizer="byte", text_key="text", cache="", fim_rate=0.0, held_out=0.5
        ),
        checkpoint=CheckpointConfig(every_steps=1, keep=1, on_failure="stop", restarts=0),
        anomaly=AnomalyConfig(
            rule="stop", window=8, loss_score=0.0, grad_norm_score=0.0, most=1
        ),
        deadlines=DeadlineConfig(
            join=1, start=1, compile=1, first_step=1, step=0, save=1, evaluation=1, end=1
        ),
        log=LogConfig(every_steps=1),
        evaluation=EvaluationConfig(tokens=0),
    )  # fmt: skip


def _layout(model: ModelConfig) -> LayoutConfig:
    return LayoutConfig(
        zero=0,
        # A model without node-limited routing sends a token to any number of nodes.
        dispatch="two_hop" if model.groups > 1 else "flat",
        capacity_factor=2.0,  # more copies than that take further rounds; none is dropped
        micro_batches_in_flight=1,
        pipeline="1f1b",
        stage_layers=(),
        ramps="mask",
        defer_weight_gradients=False,
        cost_profile="",
        communication_sms=20,
        recompute="none",
        attention_block=512,
        unroll=4,  # above 1, decoding keeps the layers as separate arrays, which it reads faster
        loss_chunk=512,
        rules={
            "batch": ("replica", "node", "gpu"),
            "experts": ("node", "gpu"),
            "heads": ("tensor",),
            "dense_width": ("gpu", "tensor"),
            "expert_width": ("tensor",),
            "vocab": ("gpu", "tensor"),
        },
    )
