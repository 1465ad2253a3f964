"""Start-up of the processes of a run, and their agreement to stop.

A run is one process, or many under `jax.distributed`. Flags name the processes (local.sh,
Kubernetes), or the environment of SLURM or Open MPI does.
"""

import logging
import signal
import warnings
from types import FrameType

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import one_line
from deepseek_jax.runtime import joining, launchers, signals
from deepseek_jax.runtime.environment import MOST_EMULATED

_LONGEST_WAIT = 7 * 24 * 3600  # seconds


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    emulate_devices: int | None = None,
    join_timeout: int = 300,
    attempt: str = "",
) -> None:
    """Joins this process to its run; call it before anything asks JAX for a device.

    Args:
      coordinator: HOST:PORT where process 0 listens, or None.
      processes: number of processes.
      process: index of this process, in [0, processes).
      emulate_devices: number of virtual CPU devices in this process; None for the real devices.
      join_timeout: seconds to wait for the other processes.
      attempt: name of this start of the run, the same in all its processes; "" for the launcher's.

    Raises:
      ConfigError: the flags contradict one another, JAX has started already, or other processes
        were not found.
    """
    explicit = _explicit(coordinator, processes, process)
    if not 1 <= join_timeout <= _LONGEST_WAIT:
        raise ConfigError(f"--join_timeout={join_timeout}; expected 1 to {_LONGEST_WAIT:,} seconds")
    launched = launchers.tasks()
    if not explicit and launched == 1:
        launchers.refuse_lone_starts()
    if emulate_devices is not None:
        _emulate(emulate_devices)
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if explicit or launched > 1:
        joining.join(explicit or joining.found_by_jax(), launchers.attempt(attempt), join_timeout)
    _find_devices()


def is_primary() -> bool:
    """Whether this is process 0, which alone prints and writes files that exist once."""
    return jax.process_index() == 0


class StopSignal:
    """SIGTERM, SIGHUP or Ctrl-C to any process, which stops all processes after the same step."""

    def __init__(self) -> None:
        self._heard = False

    def install(self) -> None:
        """Lets signals wait for the end of a step from now on; call it before the second step.

        Under `jax.distributed` JAX takes SIGTERM from here on, and tells the other processes.
        """
        if jax.distributed.is_initialized():
            _let_jax_hear()
        elif not signals.of_command():
            signal.signal(signal.SIGTERM, self._hear)
        signals.stepping()

    def request(self) -> None:
        """Asks all processes to stop, as a signal to this one would."""
        if jax.distributed.is_initialized():
            signal.raise_signal(signal.SIGTERM)  # JAX handles it and tells the other processes
        else:
            self._heard = True

    def reached(self, step: int) -> bool:
        """Whether to save and stop after this step; call it after every step, in order.

        The answer is the same on all processes. With more than one, it becomes true up to a second
        after the signal, at a step that no process has passed.
        """
        heard = self._heard or signals.heard() is not None
        if not jax.distributed.is_initialized():
            return heard
        if heard and not self._heard:  # by a signal that JAX does not know
            self._heard = True
            signal.raise_signal(signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(step)

    def steps_are_over(self, stopped: bool) -> None:
        """Lets signals end the command at once again; `stopped` if one has ended the steps."""
        signals.steps_are_over(stopped)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        self._heard = True


def _let_jax_hear() -> None:
    """Starts JAX's preemption service, which replaces the handler of SIGTERM.

    JAX would start it with the connection, and SIGTERM would then have no effect before the first
    step is compiled.
    """
    state = distributed.global_state
    if state.preemption_sync_manager is None:
        jax.config.update("jax_enable_preemption_service", True)
        state.initialize_preemption_sync_manager()


def _explicit(
    coordinator: str | None, processes: int | None, process: int | None
) -> joining.Place | None:
    """The place that the flags describe, if they do; some of them without the rest raise."""
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return None
    if coordinator is None or processes is None or process is None:
        raise ConfigError(
            f"missing {' and '.join(missing)}; a run of many processes needs --coordinator, "
            "--processes and --process together, one process alone needs none of them"
        )
    if processes < 1 or not 0 <= process < processes:
        raise ConfigError(
            f"--process={process} of --processes={processes}; expected 0 <= process < processes"
        )
    joining.check_address(coordinator, here=process == 0)
    return joining.Place(coordinator, processes, process)


def _emulate(devices: int) -> None:
    """Replaces the real devices by virtual CPU devices."""
    if not 1 <= devices <= MOST_EMULATED:
        raise ConfigError(f"--emulate_devices={devices}; expected 1 to {MOST_EMULATED:,} devices")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:
        if jax.local_device_count("cpu") != devices:
            raise ConfigError(
                f"--emulate_devices={devices} came after JAX had started with "
                f"{jax.local_device_count('cpu')} CPU devices; set it before the first JAX call"
            ) from error


def _find_devices() -> None:
    """Starts JAX's backend; ConfigError where there is none of the platforms that were chosen."""
    log, failed = logging.getLogger("jax._src.xla_bridge"), _Kept()
    log.addFilter(failed)
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        said = one_line(" ".join(str(error).split())) or "JAX finds no device of it here"
        if isinstance(error, RuntimeError) and (
            jax.errors.JaxRuntimeError is type(error) or "backend" not in said
        ):
            raise
        why = "".join(f" ({one_line(reason)})" for reason in failed.reasons)
        chosen = jax.config.values["jax_platforms"]
        raise ConfigError(
            f"JAX_PLATFORMS={chosen}: {said}{why}; unset it or name another"
        ) from error
    finally:
        log.removeFilter(failed)
    for reason in failed.reasons:
        warnings.warn(f"JAX goes on without a plugin: {one_line(reason)}", stacklevel=2)


class _Kept(logging.Filter):
    """Keeps the reasons of plugins that failed, which JAX logs with their stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info or not record.exc_info[1]:
            return True
        self.reasons.append(" ".join(str(record.exc_info[1]).split()))
        return False
