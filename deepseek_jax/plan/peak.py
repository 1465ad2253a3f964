"""Peak device memory that comparison and search ask for."""

from deepseek_jax.config import Config
from deepseek_jax.hardware.chips import Chip
from deepseek_jax.plan.memory import memory

# Assumed, not measured: CUDA context, buffers of the messages' library, fragmentation.
RESERVE_BYTES = 2 * 2**30


def peak_bytes(config: Config) -> int:
    """Peak bytes of one device in training.

    Args:
      config: Config of the run, whose mesh has no -1.

    Raises:
      ConfigError: Sizes that do not fit the mesh.
    """
    return memory(config).total


def room_bytes(chip: Chip) -> int:
    """Bytes of a device that a training program may use."""
    return chip.hbm_bytes - RESERVE_BYTES
