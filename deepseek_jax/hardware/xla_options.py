"""Compiler options for GPUs, the same for training and for a virtual cluster."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import name_shown

# The dot merger joins the GEMMs of two chunks into one that waits for the messages of both. At the
# default memory limit of 95 % the scheduler silently gives up overlap in programs whose real peak
# fits. Command buffers hide computation from the schedule.
OPTIONS: Mapping[str, Any] = {
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_memory_limit_slop_factor": 125,
    "xla_gpu_enable_command_buffer": "",
}
PROFILE = "xla_gpu_pgle_profile_file_or_directory_path"
SUFFIX = ".pbtxt"  # XLA silently ignores a profile in text form with any other suffix


def options(backend: str, profile: str = "") -> dict[str, Any]:
    """Compiler options of a training step; empty unless the backend is a GPU.

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
    if backend != "gpu":
        return {}
    return {**OPTIONS, **({PROFILE: str(Path(profile).absolute())} if profile else {})}


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
