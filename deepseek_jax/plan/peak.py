"""Peak device memory as comparison and search ask for it, and the memory that a program may use."""

from deepseek_jax.config import Config, stage_count
from deepseek_jax.hardware.chips import Chip
from deepseek_jax.parallel.pipeline.timeline import peak_formula
from deepseek_jax.plan.device_memory import ACTIVATIONS, DeviceMemory, device_memory

# Assumed, not measured: CUDA context, buffers of the messages' library, fragmentation.
RESERVE_BYTES = 2 * 2**30


def peak_bytes(config: Config, execution: str = "lockstep") -> int:
    """Peak bytes of one device in training.

    Args:
      config: Config of the run, whose mesh has no -1.
      execution: "lockstep", this project's executors; or "asynchronous", whose ranks hold the
        published number of chunks. Without a pipeline they are the same.

    Raises:
      ConfigError: Sizes that do not fit the mesh.
    """
    found = device_memory(config)
    less = 1 - held(config, found, execution) / found.held
    return found.peak - round(found.items[ACTIVATIONS] * less)


def live_layers(config: Config, execution: str = "lockstep") -> int:
    """Layers, times the micro-batches whose activations each keeps at the peak, without MTP."""
    found = device_memory(config)
    return held(config, found, execution) * found.layers_held


def held(config: Config, found: DeviceMemory, execution: str) -> int:
    """Micro-batches of a chunk whose activations a device keeps at once."""
    if execution == "lockstep" or config.mesh.pipe == 1:
        return found.held
    stages = stage_count(config.layout.pipeline, config.mesh.pipe)
    return peak_formula(config.layout.pipeline, stages)


def room_bytes(chip: Chip) -> int:
    """Bytes of a device that a training program may use; 0 where less than the reserve is there."""
    return max(0, chip.hbm_bytes - RESERVE_BYTES)
