"""The connection between the processes of a run: waiting for them, and losing one."""

import contextlib
import ctypes
import functools
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed

from deepseek_jax.config import ConfigError
from deepseek_jax.runtime import signals

_FIRST_WORD = 10.0  # seconds of silence before a process says that it waits
_NEXT_WORD = 30.0

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


@contextlib.contextmanager
def waiting(what: str, timeout: int) -> Iterator[None]:
    """Says now and then what this process waits for, and ends it after `timeout` seconds.

    XLA, left to itself, would say nothing and abort the process.
    """
    come = threading.Event()

    def watch() -> None:
        began, pause = time.monotonic(), _FIRST_WORD
        while not come.wait(min(pause, timeout - (time.monotonic() - began))):
            waited = time.monotonic() - began
            if waited >= timeout:
                print(
                    f"error: {what}: not all came in {timeout} s (--join_timeout); check the host, "
                    "the port, a firewall, and that as many processes as --processes says run",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)
            print(f"{what} ({waited:.0f} s of {timeout})", file=sys.stderr, flush=True)
            pause = _NEXT_WORD

    threading.Thread(target=watch, daemon=True, name="joining").start()
    try:
        yield
    finally:
        come.set()


def join(**how: Any) -> None:
    """Connects to the other processes."""
    _mute_gloo()
    _tell_at_terminate()
    jax.config.update("jax_enable_preemption_service", False)  # `StopSignal` starts it
    library, name = distributed._jax, "get_distributed_runtime_client"
    client = getattr(library, name)
    setattr(library, name, functools.partial(client, missed_heartbeat_callback=_end_alone))
    try:
        jax.distributed.initialize(**how, initialization_timeout=30 * 24 * 3600)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"this process could not join its run ({said}); "
            "give --coordinator=HOST:PORT --processes=N --process=I"
        ) from error
    finally:
        setattr(library, name, client)


def lost(text: str) -> str:
    """Line for an error that a lost process has caused; "" for other errors."""
    if not jax.distributed.is_initialized() or not any(re.search(sign, text) for sign in _LOST):
        return ""
    return f"{_whom(text)} of this run is gone ({text[:120]}); {_CURE}"


_CURE = "its own output says why. Started again, the same command goes on from the last checkpoint"


def _whom(text: str) -> str:
    others = sorted(
        {int(n) for n in re.findall(r"task:(\d+)", text)} - {distributed.global_state.process_id}
    )
    return f"process {', '.join(map(str, others))}" if others else "another process"


def _end_alone(*status: Any) -> None:
    """Called by XLA in place of an abort, when the coordination service has lost a process."""
    if not signals.has_ended():
        text = " ".join(str(part) for part in status)
        os.write(2, f"error: {_whom(text)} of this run is gone; {_CURE}\n".encode())
    os._exit(1)


_at_terminate = ctypes.CFUNCTYPE(None)(_end_alone)


def _tell_at_terminate() -> None:
    """Calls `_end_alone` where C++ would abort, too.

    XLA cannot hand its status to a callback in Python (jaxlib 0.10.2: std::bad_cast), and aborts.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(_at_terminate)


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
