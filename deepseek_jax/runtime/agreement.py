"""Agreement between processes: an error in one is raised in all, so that none waits for a peer."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.config import ConfigError
from deepseek_jax.errors import RunError, SaveFailed

T = TypeVar("T")

# Letter by which the kind of an error travels, and the kinds, from special to general.
_KINDS = {"S": SaveFailed, "R": RunError, "C": Exception}
_RAISED = {**_KINDS, "C": ConfigError}

_LONGEST = 2048  # bytes of a text that other processes receive


def raise_together(attempt: Callable[[], T]) -> T:
    """Calls `attempt` in every process and returns its value; all processes have to call this.

    Raises:
      ConfigError: `attempt` failed in some process; has the message of the first such process.
      RunError, SaveFailed: the same, where that process's own error is of this kind.
    """
    if jax.process_count() == 1:
        return attempt()
    failure: Exception | None = None
    try:
        value = attempt()
    except Exception as error:
        failure = error
    text = ""
    if failure is not None:
        kind = next(letter for letter, known in _KINDS.items() if isinstance(failure, known))
        text = kind + (str(failure) or type(failure).__name__)
    if said := first_said(text):
        raise _RAISED[said[0]](said[1:]) from failure
    return value


def first_said(text: str) -> str:
    """The text of the first process that has one, for all; "" if none has."""
    if jax.process_count() == 1:
        return text
    mine = np.zeros(_LONGEST, np.uint8)
    said = text.encode()[:_LONGEST]
    mine[: len(said)] = np.frombuffer(said, np.uint8)
    for row in multihost_utils.process_allgather(mine):
        if row.any():
            return row.tobytes().rstrip(b"\0").decode(errors="ignore")
    return ""


def from_primary(value: int) -> int:
    """Value of process 0, for all; file listings of a shared file system can differ by process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def all_true(fine: bool) -> bool:
    """Whether `fine` is true in every process."""
    if jax.process_count() == 1:
        return fine
    return bool(multihost_utils.process_allgather(np.bool_(fine)).all())
