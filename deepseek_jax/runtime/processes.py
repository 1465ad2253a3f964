"""Start-up of one process of a run, and how all processes agree to stop.

A run is one process, or many under `jax.distributed`: told so by flags (local.sh, Kubernetes), or
found in the environment of SLURM and Open MPI.
"""

import os
import signal
import sys
from types import FrameType

import jax
from jax.experimental import multihost_utils

from deepseek_jax.config import ConfigError


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    emulate_devices: int | None = None,
) -> None:
    """Joins this process to its run; call it before anything asks JAX for a device.

    Args:
      coordinator: HOST:PORT where process 0 listens, or None.
      processes: how many there are.
      process: which one this is, in [0, processes).
      emulate_devices: virtual CPU devices in this process, or None for the real devices.

    Raises:
      ConfigError: flags that do not work together, a start that came too late, or peers that
        were not found.
    """
    explicit = _explicit(coordinator, processes, process)
    if emulate_devices is not None:
        _emulate(emulate_devices)
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if explicit:
        # Without "deactivate" JAX would mix in what it finds of SLURM, and take one GPU only.
        _join(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process,
            cluster_detection_method="deactivate",
        )
    elif _tasks() > 1:
        _join()


def is_primary() -> bool:
    """Whether this is process 0: the one that prints, and writes what is written once."""
    return jax.process_index() == 0


class StopSignal:
    """SIGTERM, heard by any process, stops all of them after the same step."""

    def __init__(self) -> None:
        self._heard = False

    def install(self) -> None:
        """Listens for SIGTERM from now on; under `jax.distributed` JAX listens already."""
        if not jax.distributed.is_initialized():
            signal.signal(signal.SIGTERM, self._hear)

    def reached(self, step: int) -> bool:
        """Whether to save and stop after this step; to be asked after every step, in order.

        The answer is the same on all processes. With many it comes up to a second after the signal,
        at a step that none of them has passed.
        """
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._heard

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        self._heard = True


def _explicit(coordinator: str | None, processes: int | None, process: int | None) -> bool:
    """Whether the flags describe a run of many processes; half a description is an error."""
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return False
    if coordinator is None or processes is None or process is None:
        raise ConfigError(
            f"missing {' and '.join(missing)}; a run of many processes needs --coordinator, "
            "--processes and --process together, one process alone needs none of them"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator is {coordinator!r}; expected HOST:PORT of process 0")
    if processes < 1 or not 0 <= process < processes:
        raise ConfigError(
            f"--process={process} of --processes={processes}; expected 0 <= process < processes"
        )
    return True


def _emulate(devices: int) -> None:
    """Virtual CPU devices instead of the real ones."""
    if devices < 1:
        raise ConfigError(f"--emulate_devices={devices}; expected at least one device")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:
        if jax.local_device_count("cpu") != devices:
            raise ConfigError(
                f"--emulate_devices={devices} came after JAX had started with "
                f"{jax.local_device_count('cpu')} CPU devices; set it before the first JAX call"
            ) from error


def _tasks() -> int:
    """How many processes SLURM's srun or Open MPI's mpirun started, 1 without either."""
    names = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return max(int(os.environ.get(name, "1")) for name in names)


def _join(**how: str | int | None) -> None:
    _mute_gloo()
    try:
        jax.distributed.initialize(**how)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"this process could not join its run: {error}; "
            "give --coordinator=HOST:PORT --processes=N --process=I"
        ) from error


def _mute_gloo() -> None:
    """Gloo writes a line per peer to file descriptor 1, from C++; our own lines keep their way."""
    try:
        ours = os.dup(sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):  # no standard output, or one that is no file
        return
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    sys.stdout = os.fdopen(ours, "w", buffering=1)
