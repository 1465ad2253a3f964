"""Agreement between processes: an error in one is raised in all, so that none waits for a peer."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.config import ConfigError
from deepseek_jax.errors import RunError

T = TypeVar("T")

_LONGEST = 2048  # bytes of an error message that other processes receive


def raise_together(attempt: Callable[[], T]) -> T:
    """Calls `attempt` in every process and returns its value; all processes have to call this.

    Raises:
      ConfigError: `attempt` failed in some process; has the message of the first such process.
      RunError: the same, where that process's own error is a RunError.
    """
    if jax.process_count() == 1:
        return attempt()
    failure: Exception | None = None
    try:
        value = attempt()
    except Exception as error:
        failure = error
    text = np.zeros(_LONGEST, np.uint8)
    if failure is not None:
        kind = b"R" if isinstance(failure, RunError) else b"C"
        message = kind + (str(failure) or type(failure).__name__).encode()[: _LONGEST - 1]
        text[: len(message)] = np.frombuffer(message, np.uint8)
    for row in multihost_utils.process_allgather(text):
        if row.any():
            said = row.tobytes().rstrip(b"\0").decode(errors="ignore")
            raise (RunError if said[0] == "R" else ConfigError)(said[1:]) from failure
    return value


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
