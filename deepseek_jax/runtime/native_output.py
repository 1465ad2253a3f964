"""Output of C++ libraries: into a file instead of onto the screen, in a run of several processes.

Gloo writes a line per process to file descriptor 1. XLA writes its errors to file descriptor 2,
and, where a process is lost, a page with a stack. Both descriptors are pointed at one file, which
`keep` moves into the workdir, and Python's streams at copies of the old ones.
"""

import atexit
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TextIO

import absl.logging

FOLDER = "logs"

_LONGEST_TAIL = 1 << 14  # bytes

_log: Path | None = None  # the file of now
_file: int | None = None  # the same, open, for it may be removed
_begin = 0  # bytes in it of earlier attempts
_stderr = 2


def stderr() -> int:
    """File descriptor of the command's own standard error."""
    return _stderr


def divert() -> None:
    """Diverts what C++ writes into a temporary file; called once."""
    global _log, _file, _stderr
    if _log is not None:
        return
    try:
        number, name = tempfile.mkstemp(prefix="deepseek_jax_", suffix=".log")
    except OSError:
        number, name = os.open(os.devnull, os.O_WRONLY), os.devnull
    _log = Path(name)
    for stream in ("stdout", "stderr"):
        try:
            old = getattr(sys, stream)
            old.flush()
            ours = os.dup(old.fileno())
        except (AttributeError, OSError, ValueError):  # no such stream, or one that is no file
            continue
        os.dup2(number, old.fileno())
        new = os.fdopen(ours, "w", buffering=1, errors="backslashreplace")
        setattr(sys, stream, new)
        _move_handlers(old, new)
        if stream == "stderr":
            _stderr = ours
            absl.logging.get_absl_handler().python_handler.stream = new
    _file = number
    atexit.register(remove)


def _move_handlers(old: TextIO, new: TextIO) -> None:
    """Lets the handlers of all loggers that write to one stream write to another one."""
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):  # a placeholder has none
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)


def keep(workdir: Path, process: int) -> None:
    """Moves the file into the workdir, to which C++ appends from now on."""
    global _log, _file, _begin
    if _log is None:
        return
    path = workdir / FOLDER / f"process_{process}.log"
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        begin = os.fstat(file).st_size
        with (
            contextlib.suppress(OSError),
            _log.open("rb") as before,
            os.fdopen(os.dup(file), "ab") as after,
        ):
            shutil.copyfileobj(before, after)
        for number in (1, 2):
            os.dup2(file, number)
        remove()
        before_it, _file, _log, _begin = _file, file, path, begin
        if before_it is not None:
            os.close(before_it)


def tail() -> str:
    """The end of what C++ has written in this process."""
    if _file is None:
        return ""
    with contextlib.suppress(OSError):
        begin = max(_begin, os.fstat(_file).st_size - _LONGEST_TAIL)
        return os.pread(_file, _LONGEST_TAIL, begin).decode(errors="replace")
    return ""


def remove() -> None:
    """Removes the file, if it is a temporary one."""
    if _log is not None and _log.parent == Path(tempfile.gettempdir()):
        with contextlib.suppress(OSError):
            _log.unlink()
