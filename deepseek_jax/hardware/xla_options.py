"""Compiler options of a training step: for GPUs, real and virtual, and for CPUs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from deepseek_jax import host_cpu
from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import name_shown

# The dot merger joins the GEMMs of two chunks into one that waits for the messages of both. The
# scheduler silently gives up overlap where its own estimate of memory exceeds a limit, 95 % by
# default; the estimate exceeds the compiled peak by 30 GiB and more where a loop carries much, as
# in V3's step. Command buffers hide computation from the schedule.
OPTIONS: Mapping[str, Any] = {
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_memory_limit_slop_factor": 160,
    "xla_gpu_enable_command_buffer": "",
}
# Library of matmuls on a CPU, in jax 0.10. YNNPACK, the default, computes a step of `bench train`
# in 0.89 of Eigen's time on a CPU with AVX2 alone, and takes 4 to 8 % more on one with AVX-512
# (measured on two machines of two cores). Reductions stay with YNNPACK. In jax 0.12 the option
# confines batched products to one core, and is left out.
MATMULS_ON_CPU = "xla_cpu_experimental_ynn_fusion_type"
_EIGEN = {MATMULS_ON_CPU: "LIBRARY_FUSION_TYPE_REDUCE"}
_LEVEL = "xla_backend_optimization_level"
_BEFORE_0_11 = jax.__version_info__ < (0, 11)
# LLVM's level 2 compiles the step of `v3_tiny` in 11.9 s of processor time, and level 3, which is
# the default, in 14.0 s; steps took 128.7 and 130.0 ms, and 112 losses were equal (measured once).
CPU_OPTIONS: Mapping[str, Any] = {
    _LEVEL: 2,
    **(_EIGEN if _BEFORE_0_11 and host_cpu.has("avx512f") else {}),
}
# For a program that runs once. On a CPU, optimised code may round the last, incomplete vector of a
# loop in another way, and its length depends on the layout: unoptimised code gives the same numbers
# on all layouts. Without the emitters of fusions, which jax 0.12 always uses, it compiles sooner.
ONCE_ON_CPU: Mapping[str, Any] = {
    _LEVEL: 0,
    **({"xla_cpu_use_fusion_emitters": False} if _BEFORE_0_11 else {}),
}
PROFILE = "xla_gpu_pgle_profile_file_or_directory_path"
SUFFIX = ".pbtxt"  # XLA silently ignores a profile in text form with any other suffix


def options(backend: str, profile: str = "") -> dict[str, Any]:
    """Compiler options of a training step.

    A choice of XLA_FLAGS for a CPU is left alone.

    Args:
      backend: Name of the backend, as `jax.default_backend()` returns it.
      profile: `layout.cost_profile`, a file of instruction costs: estimated by `plan step`, or
        measured by XLA's profiler; "" for none.

    Raises:
      ConfigError: No such file, or one that XLA would ignore.
    """
    if profile and (fault := _fault(profile)):
        raise ConfigError(
            f"layout.cost_profile={name_shown(profile, 150)} {fault}; write one with python -m "
            "deepseek_jax.plan step, or set layout.cost_profile=''"
        )
    if backend == "cpu":
        chosen = os.environ.get("XLA_FLAGS", "")
        return {name: value for name, value in CPU_OPTIONS.items() if name not in chosen}
    if backend != "gpu":
        return {}
    return {**OPTIONS, **({PROFILE: str(Path(profile).absolute())} if profile else {})}


def forward_options(backend: str) -> dict[str, Any]:
    """Compiler options of a program that only scores: on a CPU those of a training step."""
    return options(backend) if backend == "cpu" else {}


def _fault(profile: str) -> str:
    """Reason why XLA could not read a profile; "" if it can."""
    if not profile.endswith(SUFFIX):
        return f"is not a file that ends in {SUFFIX}"
    try:
        with open(profile, encoding="utf-8") as file:
            start = file.read(4096)
    except (
        OSError,
        ValueError,
    ) as error:  # ValueError: a NUL in the path, or bytes that are no text
        why = error.strerror if isinstance(error, OSError) else "no text"
        return f"is not a file that can be read ({why})"
    return "holds no text" if "\0" in start else ""
