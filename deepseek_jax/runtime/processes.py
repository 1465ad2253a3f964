"""Start-up of the processes of a run, and their agreement to stop.

A run is one process, or many under `jax.distributed`. Flags name the processes (local.sh,
Kubernetes), or the environment of SLURM or Open MPI does.
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
      processes: number of processes.
      process: index of this process, in [0, processes).
      emulate_devices: number of virtual CPU devices in this process; None for the real devices.

    Raises:
      ConfigError: the flags contradict one another, JAX has started already, or other processes
        were not found.
    """
    explicit = _explicit(coordinator, processes, process)
    if emulate_devices is not None:
        _emulate(emulate_devices)
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if explicit:
        # Without "deactivate" JAX would also read the environment of SLURM, and take one GPU only.
        _join(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process,
            cluster_detection_method="deactivate",
        )
    elif _tasks() > 1:
        _join()


def is_primary() -> bool:
    """Whether this is process 0, which alone prints and writes files that exist once."""
    return jax.process_index() == 0


class StopSignal:
    """SIGTERM to any process, which stops all processes after the same step."""

    def __init__(self) -> None:
        self._heard = False

    def install(self) -> None:
        """Handles SIGTERM from now on; under `jax.distributed` JAX handles it already."""
        if not jax.distributed.is_initialized():
            signal.signal(signal.SIGTERM, self._hear)

    def request(self) -> None:
        """Asks all processes to stop, as a signal to this one would."""
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)  # JAX handles it and tells the other processes
        else:
            self._heard = True

    def reached(self, step: int) -> bool:
        """Whether to save and stop after this step; call it after every step, in order.

        The answer is the same on all processes. With more than one, it becomes true up to a second
        after the signal, at a step that no process has passed.
        """
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._heard

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        self._heard = True


def _explicit(coordinator: str | None, processes: int | None, process: int | None) -> bool:
    """Whether the flags describe a run of many processes; some of them without the rest raise."""
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
    """Replaces the real devices by virtual CPU devices."""
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
    """Number of processes that srun or mpirun started; 1 without either."""
    names = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return max(int(os.environ.get(name, "1")) for name in names)


def _join(**how: str | int | None) -> None:
    """Connects to the other processes."""
    _mute_gloo()
    try:
        jax.distributed.initialize(**how)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"this process could not join its run: {error}; "
            "give --coordinator=HOST:PORT --processes=N --process=I"
        ) from error


def _mute_gloo() -> None:
    """Hides the line per process that gloo writes to file descriptor 1; Python's output remains."""
    try:
        ours = os.dup(sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):  # no standard output, or one that is no file
        return
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    sys.stdout = os.fdopen(ours, "w", buffering=1)
