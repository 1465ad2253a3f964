"""End of a process from any thread because another process of the run hangs or is gone.

The first caller says its line and ends the process; the others wait for that.
"""

import contextlib
import os
import threading
import time

from deepseek_jax.runtime import native_output, progress, signals

_LONGEST_WAIT = 120.0  # seconds
_first = threading.Lock()


def may_leave() -> bool:
    """Whether this process is a command, which this module may end."""
    return signals.of_command()


def warn(line: str) -> None:
    """Writes a line to the standard error of the command."""
    with contextlib.suppress(OSError):
        os.write(native_output.stderr(), f"{line}\n".encode())


def claim() -> None:
    """Returns to the first thread that ends this process; others wait until it has done so."""
    if may_leave() and not _first.acquire(blocking=False):
        time.sleep(_LONGEST_WAIT)


def end(code: int, line: str, *, wait: float = 0.0) -> None:
    """Ends this process, without Python's way out.

    Args:
      wait: seconds between the line and the end.
    """
    claim()
    signals.ended(code)
    warn(line)
    progress.within(5, lambda: progress.current.ended(code, line.removeprefix("error: ")))
    time.sleep(wait)
    native_output.remove()
    os._exit(code)
