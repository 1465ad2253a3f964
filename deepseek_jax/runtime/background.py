"""Threads for work beside the main thread, which do not keep the program from ending."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_waiting: set[int] = set()  # threads in `waiting`, by identifier


def in_background(act: Callable[[], T], name: str) -> Future[T]:
    """Calls `act` in a daemon thread.

    Args:
      name: of the thread, for a stack dump.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    _threads.add(thread)
    return future


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Marks this thread, of which the program does not wait for the end, as inside C++ code."""
    own = threading.get_ident()
    _waiting.add(own)
    try:
        yield
    finally:
        _waiting.discard(own)


def leave_behind() -> None:
    """Notes that a library failed, and may have threads that wait for ever."""
    _waiting.add(0)


def is_busy() -> bool:
    """Whether a thread of `in_background` is at work, or one is in `waiting`, or left behind.

    One that returns from C++ code while the interpreter ends aborts the process.
    """
    return bool(_waiting) or any(thread.is_alive() for thread in _threads)
