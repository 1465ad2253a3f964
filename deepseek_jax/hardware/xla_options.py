"""How XLA compiles for GPUs: alike where training runs and for a cluster that is not there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.config import ConfigError

# Merged dots join two chunks' GEMMs into one that waits for both chunks' traffic. At its default of
# 95 % the scheduler gives up overlap, silently, in programs whose real peak fits. Command buffers
# would hide compute from the schedule.
OPTIONS: Mapping[str, Any] = {
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_memory_limit_slop_factor": 125,
    "xla_gpu_enable_command_buffer": "",
}
PROFILE = "xla_gpu_pgle_profile_file_or_directory_path"
ENDING = ".pbtxt"  # XLA reads this one as text, and ignores a file of any other without a word


def options(backend: str, profile: str = "") -> dict[str, Any]:
    """Compiler options of a training step; none but for a GPU.

    Args:
      backend: as `jax.default_backend()` names it.
      profile: layout.cost_profile, what each instruction costs (`plan step` writes one; XLA's
        profiler writes one that is measured), or nothing.

    Raises:
      ConfigError: there is no such profile, or XLA would not read it.
    """
    if profile and not (Path(profile).is_file() and profile.endswith(ENDING)):
        raise ConfigError(
            f"layout.cost_profile={profile} is not a file that ends in {ENDING}; write one with "
            "python -m deepseek_jax.plan step, or set layout.cost_profile=''"
        )
    if backend != "gpu":
        return {}
    return {**OPTIONS, **({PROFILE: str(Path(profile).absolute())} if profile else {})}
