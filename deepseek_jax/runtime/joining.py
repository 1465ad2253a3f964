"""The connection between the processes of a run: waiting for them, and losing one."""

import contextlib
import ctypes
import itertools
import os
import re
import signal
import socket
import time
from typing import Any, NamedTuple

import jax
from jax._src import clusters, distributed

from deepseek_jax.config import ConfigError
from deepseek_jax.errors import AGAIN, LostPeer
from deepseek_jax.runtime import leaving, native_output, progress, rendezvous, signals, suspects

_FIRST_WORD = 10.0  # seconds of silence before a process says that it waits
_NEXT_WORD = 30.0
_CONNECT_SECONDS = 60  # to the coordinator, after all processes have met
_HEARTBEAT_SECONDS = 40  # of silence, until the coordinator gives up a process; JAX has 100
_MOMENT = 5  # seconds in which an error of all processes reaches all of them
_LONGEST_END = 24 * 3600  # seconds; the watchdog has a shorter deadline
_STATUS = r"distributed service detected fatal errors.*?absl::Status: (.*?)(?:\*\*\*|$)"
_JOIN_CURE = (
    "check its host, the port, a firewall, and that as many processes as --processes says run; "
    "--join_timeout sets the time"
)

# What XLA says when process 0, where the coordinator runs, does not answer.
_COORDINATOR_LOST = r"Failed to send RPC to coordination service|CoordinationService/Heartbeat"

# What a collective says when a process at its other end has gone.
_LOST = (
    r"[Gg]loo\b.*([Cc]onnection|[Ss]ocket|timed? ?out|[Bb]roken pipe)",
    r"NCCL.*(remote process|system error|Connection|aborted)",
    r"coordination service.*(error|unavailable|timed? ?out)",
    r"heartbeat|[Bb]arrier (timed out|failed)|CoordinationServiceError",
    r"[Cc]onnection (reset|closed) by peer",
)


def check_address(coordinator: str, *, here: bool) -> None:
    """Raises ConfigError for a HOST:PORT that cannot be one.

    Args:
      here: whether this process is to listen there.
    """
    host, _, port = coordinator.rpartition(":")
    named = f"--coordinator is {coordinator!r}"
    if not re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.%]+\]", host) or not re.fullmatch("[0-9]+", port):
        raise ConfigError(f"{named}; expected HOST:PORT of process 0")
    if not 0 < int(port[:6]) < 1 << 16:
        raise ConfigError(f"{named}; a port is 1 to 65535")
    if here:
        family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
        try:
            with socket.socket(family) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", int(port)))
        except OSError as error:
            if error.errno in (1, 13, 98):  # not permitted, no access, in use
                raise ConfigError(f"{named}: {error.strerror}; give another port") from error


class Place(NamedTuple):
    """Place of a process in its run.

    Attributes:
      coordinator: HOST:PORT of process 0.
      devices: local devices of this process, where the launcher shares them out; None for all.
    """

    coordinator: str
    processes: int
    process: int
    devices: Any = None


def found_by_jax() -> Place:
    """The place that the launcher's environment gives this process."""
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, 300
        )
        address, processes, process, devices = found
        return Place(str(address), int(processes or 1), int(process or 0), devices)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise _cannot_join(error) from error


def join(place: Place, attempt: str, timeout: int) -> None:
    """Meets the other processes and connects to them; ends this process where they do not come.

    Args:
      attempt: name of this start, which all its processes share; "" for any.
      timeout: seconds to wait.
    """
    progress.begin(place.process, place.processes)
    native_output.divert()
    _tell_at_abort()
    said = _Said(place.process, timeout)
    try:
        rendezvous.meet(
            place.coordinator, place.process, place.processes, attempt, timeout, said.say
        )
    except (rendezvous.Failed, OSError) as error:
        leaving.end(AGAIN, f"error: process {place.process} could not join: {error}; {_JOIN_CURE}")
    jax.config.update("jax_enable_preemption_service", False)  # `StopSignal` starts it
    try:
        jax.distributed.initialize(
            coordinator_address=place.coordinator,
            num_processes=place.processes,
            process_id=place.process,
            local_device_ids=place.devices,
            # Else JAX would also read the environment of SLURM, and take one GPU only.
            cluster_detection_method="deactivate",
            initialization_timeout=_CONNECT_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except Exception as error:
        raise _cannot_join(error) from error
    progress.current.enter("start")


def _cannot_join(error: Exception) -> ConfigError:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return ConfigError(
        f"this process could not join its run ({said}); "
        "give --coordinator=HOST:PORT --processes=N --process=I"
    )


class _Said:
    """Says now and then for whom this process waits."""

    def __init__(self, process: int, timeout: int):
        self._process, self._timeout = process, timeout
        self._began = time.monotonic()
        self._next = self._began + _FIRST_WORD

    def say(self, whom: str) -> None:
        now = time.monotonic()
        if now >= self._next:
            waited = f"{now - self._began:.0f} s of {self._timeout}"
            leaving.warn(f"process {self._process} waits for {whom} ({waited})")
            self._next = now + _NEXT_WORD


def wait_for_all() -> None:
    """Waits for all processes of the run; LostPeer where one is gone."""
    client = distributed.global_state.client
    if client is None:
        return
    try:
        client.wait_at_barrier(f"deepseek_jax {next(_barriers)}", _LONGEST_END * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise LostPeer(_line(str(error))) from error


def part() -> None:
    """Leaves the run at its end, together with the other processes.

    A process that ended before the others would take the coordinator, or a connection of gloo,
    from those that still use it.
    """
    wait_for_all()
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def part_soon() -> None:
    """Waits a moment for the other processes, which an error may have ended, too."""
    if client := distributed.global_state.client:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.wait_at_barrier("deepseek_jax failed", _MOMENT * 1000)


_barriers = itertools.count()


def lost(text: str) -> str:
    """Line for an error that a lost process has caused; "" for other errors."""
    if not jax.distributed.is_initialized() or not any(re.search(sign, text) for sign in _LOST):
        return ""
    return _line(text)


_CURE = "started again, the same command goes on from the last checkpoint"


def _line(text: str) -> str:
    named = suspects.lost() or _whom(text)
    return f"{named}; {_CURE}"


def _whom(text: str) -> str:
    """The process that XLA names, in the text of an error or in its log.

    That is needed before a run has its workdir, in which processes show their progress.
    """
    own, processes = distributed.global_state.process_id, progress.current.now.processes
    numbers = re.findall(r"task:(\d+)", text)
    for listed in re.findall(r"heartbeats\):\s*([\d,\s]+)", text + native_output.tail()):
        numbers += re.findall(r"\d+", listed)
    others = sorted(set(map(int, numbers)) - {own})
    if not others and processes == 2:
        others = [1 - own]
    if not others and own and re.search(_COORDINATOR_LOST, text):
        others = [0]
    who = f"process {', '.join(map(str, others))}" if others else "another process"
    said = f" ({' '.join(text.split())[:120]})" if text else ""
    return f"{who} of this run is gone or does not answer{said}"


def _end_alone(status: str) -> None:
    """Ends this process, whose coordination service has lost a process."""
    if (code := signals.end_code()) is not None:
        os._exit(code)
    leaving.end(AGAIN, f"error: {_line(status)}")


def _tell_at_abort() -> None:
    """Ends this process in place of XLA, where that aborts because a process is lost.

    XLA writes its status into the log and aborts. It cannot hand the status to a callback in Python
    (jaxlib 0.10.2 and 0.12: std::bad_cast). Any other abort goes on as it would.
    """
    with contextlib.suppress(OSError, AttributeError):
        handle = ctypes.CDLL(None).signal
        handle.argtypes = [ctypes.c_int, type(_at_abort)]
        handle(signal.SIGABRT, _at_abort)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _at_abort(number: int) -> None:
    if status := re.findall(_STATUS, native_output.tail(), re.DOTALL):
        _end_alone(status[-1])
