"""What goes wrong in one process goes wrong in all: none waits for a peer that has given up."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.config import ConfigError

T = TypeVar("T")

_LONGEST = 2048  # bytes of a message that are passed on


def raise_together(attempt: Callable[[], T]) -> T:
    """What `attempt` returns, where it returns in every process; all of them have to call this.

    Raises:
      ConfigError: it failed somewhere; with the message of the first process in which it did.
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
        told = (str(failure) or type(failure).__name__).encode()[:_LONGEST]
        text[: len(told)] = np.frombuffer(told, np.uint8)
    for row in multihost_utils.process_allgather(text):
        if row.any():
            raise ConfigError(row.tobytes().rstrip(b"\0").decode(errors="ignore")) from failure
    return value


def from_primary(value: int) -> int:
    """Process 0's value, in every process: a shared file system may show them different lists."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def all_true(fine: bool) -> bool:
    """Whether it is true in every process."""
    if jax.process_count() == 1:
        return fine
    return bool(multihost_utils.process_allgather(np.bool_(fine)).all())
