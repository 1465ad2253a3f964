"""Mark on a saved step that is being read, so that a run in the same workdir does not remove it.

A reader holds a shared `flock` on the step's folder. Without locks on its file system it reads
unmarked, and takes another step if the run removes this one.
"""

import contextlib
import fcntl
import os
from pathlib import Path


def kept_for_reading(step: Path) -> int | None:
    """An open file that keeps a run from removing this step; None where that is not possible."""
    with contextlib.suppress(OSError):
        file = os.open(step, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return file
        except OSError:  # a file system without locks
            os.close(file)
    return None


def is_being_read(step: Path) -> bool:
    """Whether another process, or a reader in this one, holds the mark."""
    with contextlib.suppress(OSError):
        file = os.open(step, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
    return False
