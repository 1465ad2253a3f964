"""Ctrl-C, SIGTERM and SIGHUP: how they end a command.

Until the command's own code runs there is nothing to put right: the process ends at once. From then
on `Stopped` is raised in the main thread, so that each `finally` on its way is kept. While a
training takes steps nothing is raised: the loop asks `heard` after each step, and saves.

Python runs handlers in the main thread, and not before C++ code such as the compiler returns. So a
thread of our own learns of each signal, too, and ends the process where the main thread does not
answer. A second Ctrl-C ends it at once.
"""

import atexit
import contextlib
import enum
import os
import select
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

# SIGHUP comes where the terminal goes, a lost ssh connection for example.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}

PATIENCE = 2.0  # seconds that C++ code may keep the main thread from answering
LONGEST_CLEANUP = 60.0  # seconds from the answer to the end of the process
ONE_PRESS = 0.5  # seconds in which a signal that comes twice (timeout, a launcher) counts once


class Stopped(BaseException):
    """A signal of `SIGNALS`, on its way from the main thread's code to the end of the command."""


class Phase(enum.Enum):
    """Effect of a signal: end at once, raise `Stopped`, be remembered, or nothing any more."""

    STARTING = enum.auto()
    WORKING = enum.auto()
    STEPPING = enum.auto()
    ENDED = enum.auto()


class _State:
    """Signals of this process; there is one such object, since handlers are the process's."""

    def __init__(self) -> None:
        self.installed = False
        self.phase = Phase.STARTING
        self.ours: list[int] = []  # signals that `_hear` handles
        self.code_of_sigterm = 143
        self.heard: int | None = None
        self.first = 0.0  # when the first signal came
        self.since = 0.0  # when the main thread last had to answer it
        self.answered = False
        self.end_code = 0


_state = _State()
_leaving = threading.Lock()


def block() -> None:
    """Keeps signals waiting, also over an exec, until `take_over`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def take_over(code_of_sigterm: int) -> None:
    """Installs the handlers, and then lets signals come that have waited."""
    _state.code_of_sigterm = code_of_sigterm
    _state.installed = True
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's & leave it
            _state.ours.append(number)
            signal.signal(number, _hear)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(woken,), daemon=True, name="signals").start()
    sys.unraisablehook = _end_if_swallowed
    atexit.register(_end)  # first, and so called last: nothing of a library runs after it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def set_code_of_sigterm(code: int) -> None:
    """Sets the exit code after SIGTERM."""
    _state.code_of_sigterm = code


def working() -> None:
    """From now on signals raise `Stopped`; does nothing in a process that is no command."""
    if _state.installed:
        _state.phase = Phase.WORKING


def stepping() -> None:
    """From now on signals are remembered for `heard`."""
    if _state.installed:
        _state.phase = Phase.STEPPING


def steps_are_over(stopped: bool) -> None:
    """Signals raise `Stopped` again.

    Args:
      stopped: whether the steps ended because of a signal, which then has done its work. A signal
        that came too late for that raises `Stopped` here.
    """
    if not _state.installed or stopped:
        return
    _state.phase = Phase.WORKING
    for number in _state.ours:  # with several processes JAX has taken SIGTERM
        signal.signal(number, _hear)
    if _state.heard is not None:
        _state.since, _state.answered = time.monotonic(), True
        raise Stopped(_state.heard)


def ended(code: int) -> None:
    """From now on the exit code is known, and signals change nothing."""
    _state.phase, _state.end_code = Phase.ENDED, code


def end_code() -> int | None:
    """The exit code, once it is known and the command's line has been said."""
    return _state.end_code if _state.phase is Phase.ENDED else None


def heard() -> int | None:
    """The signal that came first; None without any."""
    return _state.heard


def of_command() -> bool:
    """Whether this process is a command, whose signals this module handles."""
    return _state.installed


def code(number: int | None = None) -> int:
    """Exit code after a signal, by default the one that was heard, or SIGTERM."""
    number = number or _state.heard or signal.SIGTERM
    return _state.code_of_sigterm if number == signal.SIGTERM else 128 + number


def told(number: int) -> str:
    """The line that a command ends with after a signal."""
    return f"stopped by {NAMES[signal.Signals(number)]}"


def _hear(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _state.heard is None:
        _state.heard, _state.first, _state.since = number, now, now
    elif number == signal.SIGINT and now - _state.first > ONE_PRESS:
        _leave(number)
    if _state.phase is Phase.STARTING:
        _leave(number)
    if _state.phase is Phase.WORKING and not _state.answered:
        _state.answered = True
        raise Stopped(number)


def _watch(woken: int) -> None:
    """Ends the process where the main thread cannot; runs in a thread of its own."""
    number, first = 0, 0.0  # of the first signal
    while True:
        if select.select([woken], [], [], 0.25 if number else None)[0]:
            numbers, now = [n for n in os.read(woken, 64) if n in SIGNALS], time.monotonic()
            if number and signal.SIGINT in numbers and now - first > ONE_PRESS:
                _leave(signal.SIGINT)
            if numbers and not number:
                number, first = numbers[0], now
        if number and _state.phase in (Phase.STARTING, Phase.WORKING):
            limit = LONGEST_CLEANUP if _state.answered else PATIENCE
            if time.monotonic() - max(_state.since, first) > limit:
                _leave(number)


def _leave(number: int) -> None:
    """Ends the process from any thread, without Python's way out; the first call says the line."""
    if not _leaving.acquire(blocking=False):
        return
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # the cursor, which a live screen hides
        os.write(2, f"{told(number)}\n".encode())
    os._exit(code(number))


def _end_if_swallowed(unraisable: Any) -> None:
    """Ends the process where `Stopped` was raised in code that drops every exception.

    That is a `__del__`, or a callback of the garbage collector.
    """
    if isinstance(unraisable.exc_value, Stopped) and _state.heard is not None:
        _leave(_state.heard)
    sys.__unraisablehook__(unraisable)


def _end() -> None:
    """Ends the process with its exit code, where that is known, before the interpreter is freed.

    Freeing a run's programs and traces took 0.7 s (measured with `v3_tiny`). Signals are ignored:
    the interpreter gives them their default effect back, and with it another exit code.
    """
    for number in _state.ours:
        signal.signal(number, signal.SIG_IGN)
    if _state.phase is Phase.ENDED:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(_state.end_code)


def quiet_pipe() -> None:
    """Points standard output at nothing after its reader has gone, so that no flush fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(nowhere, sys.stdout.fileno())
