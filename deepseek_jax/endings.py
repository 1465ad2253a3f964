"""How a command ends: one line and an exit code for every error.

| code | what |
| --- | --- |
| 0 | done |
| 1 | the run cannot go on, or a fault of this project |
| 76 | another process of the run hangs or is gone: started again, the run goes on |
| 2 | what the user gave cannot work |
| 129, 130, 143 | SIGHUP, Ctrl-C, SIGTERM (`main`: --stop_code) |
| 141 | the reader of standard output has gone |
"""

import contextlib
import errno
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

import jax

from deepseek_jax.config import ConfigError
from deepseek_jax.errors import AGAIN, LostPeer, RunError
from deepseek_jax.runtime import background, joining, leaving, signals

TRACEBACK = "DEEPSEEK_JAX_TRACEBACK"
LONGEST_LINE = 800
CLOSED_PIPE = 141  # what a shell shows for SIGPIPE

# Errors of the machine that no program can mend.
_OF_THE_MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
    errno.EMFILE, errno.ENFILE, errno.ENOMEM,
}  # fmt: skip

_DEVICE_CURE = (
    "take a smaller batch.micro_sequences, layout.recompute=full or more devices; a smaller "
    "--slots, --cache_length or --length; docs/troubleshooting.md has the whole list"
)
_HOST_CURE = "docs/troubleshooting.md (Out of memory) says what takes memory and what can be less"


def of(error: BaseException, workdir: Path | None) -> tuple[int, str]:
    """Exit code and line of an error that ended a command; the line is empty for a closed pipe.

    Args:
      workdir: folder of the run, where a fault of this project is written to; None without one.
    """
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    if isinstance(error, signals.Stopped | KeyboardInterrupt):
        number = int(error.args[0]) if error.args else 2
        return signals.code(number), signals.told(number)
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE, ""
    if isinstance(error, LostPeer):
        return AGAIN, f"error: {_line(error)}"
    if isinstance(error, ConfigError | RunError):
        return 2 if isinstance(error, ConfigError) else 1, f"error: {_line(error)}"
    if isinstance(error, jax.errors.JaxRuntimeError | RuntimeError | ValueError) and (
        lost := joining.lost(str(error))
    ):
        return AGAIN, f"error: {lost}"
    if known := _known(error):
        return 1, f"error: {known}"
    return 1, f"error: {_of_this_project(error, workdir)}"


def _known(error: BaseException) -> str:
    """Line of an error whose cause and cure are known; "" for any other."""
    text = _line(error)
    of_jax = isinstance(error, jax.errors.JaxRuntimeError | RuntimeError | ValueError)
    if of_jax and re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", text):
        return f"not enough device memory ({text[:160]}); {_DEVICE_CURE}"
    if isinstance(error, MemoryError):
        return f"not enough host memory ({text[:160]}); {_HOST_CURE}"
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        named = f"{error.filename}: " if error.filename else ""
        return f"{named}{error.strerror}; the same command goes on once that is put right"
    return ""


def _of_this_project(error: BaseException, workdir: Path | None) -> str:
    """Line of an error that nobody expected; the stack goes into a file."""
    name = f"fault-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    said = f"{type(error).__name__}: {_line(error)[:200]}".removesuffix(": ")
    for folder in (workdir, Path(tempfile.gettempdir())):
        if folder is None or not folder.is_dir():
            continue
        try:
            (folder / name).write_text("".join(traceback.format_exception(error)))
        except (OSError, ValueError):
            continue
        return f"{said}. This is a fault of this project: please report it with {folder / name}"
    return f"{said}. This is a fault of this project; {TRACEBACK}=1 prints where it happened"


def _line(error: BaseException) -> str:
    """The message in one line that any stream can take; a very long value in it is cut."""
    text = " ".join(str(error).split()).encode(errors="backslashreplace").decode()
    return text if len(text) <= LONGEST_LINE else f"{text[:200]} ... {text[250 - LONGEST_LINE :]}"


def part(error: BaseException | None = None) -> None:
    """Leaves the run together with its other processes, if there are any.

    Args:
      error: that ended this process; None without one. Most errors end all processes at once, but
        one of this process alone must not keep it waiting.
    """
    if error is None:
        joining.part()
    elif not isinstance(error, LostPeer | signals.Stopped | KeyboardInterrupt):
        joining.part_soon()


def at_once(error: BaseException) -> bool:
    """Whether to leave out what libraries do at the exit after this error.

    JAX would wait there for processes that are gone or go on. And an import that a signal broke off
    can leave a library in a state in which its end crashes (seen with jax 0.10.2). So may a thread
    that is at work in the compiler.
    """
    if isinstance(error, signals.Stopped | KeyboardInterrupt) or background.is_busy():
        return True
    return jax.distributed.is_initialized()


def leave(code: int, line: str = "", *, at_once: bool = False) -> None:
    """Ends this process: the line to standard error, all output flushed, no failing flush later.

    Args:
      at_once: whether to leave out what libraries do at the exit.
    """
    leaving.claim()
    signals.ended(code)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        signals.quiet_pipe()
        code, line = code or CLOSED_PIPE, line
    except (OSError, ValueError) as error:
        signals.quiet_pipe()
        line = line or f"error: standard output cannot be written ({_line(error)})"
        code = code or 1
    except AttributeError:  # no standard output
        pass
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, end="\n" if line else "", flush=True)
    signals.ended(code)  # again: output that cannot be written changes the code
    if at_once:
        os._exit(code)
    if code:
        sys.exit(code)
