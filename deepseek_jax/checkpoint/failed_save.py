"""The words for a save that failed."""

import errno
import os
import shutil
from pathlib import Path

from deepseek_jax.errors import RunError, SaveFailed, reason


def failed_save(
    error: Exception, step: Path, size: int, newest: int | None, *, alone: bool
) -> RunError:
    """The error of a save, in one line.

    Args:
      error: of orbax, tensorstore or Python.
      step: folder that could not be written.
      size: bytes of its state.
      newest: the newest whole checkpoint; None where there is none.
      alone: whether no other process is at work on the save: else the run cannot go on.
    """
    why = reason(error)
    if why in (os.strerror(errno.ENOENT), os.strerror(errno.ENOTDIR)):
        cure = "Put the folder back"
    else:
        cure = "Make room there" if "space" in why or "uota" in why else "Make it writable"
    if why == os.strerror(errno.ENOSPC) and step.parent.is_dir():
        free = shutil.disk_usage(step.parent).free
        why += f": {free / 1e6:,.1f} MB free for a checkpoint of {size / 1e6:,.1f} MB"
    kept = f"the newest checkpoint is step {newest}, from which the same command goes on"
    if newest is None:
        kept = "there is no checkpoint yet, so the same command starts again"
    kind = SaveFailed if alone else RunError
    return kind(f"checkpoint {step} cannot be written ({why}). {cure}; {kept}")
