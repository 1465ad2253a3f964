"""Threads for work beside the main thread, which do not keep the program from ending."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


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


def is_busy() -> bool:
    """Whether a thread of `in_background` is at work.

    One that returns from C++ code while the interpreter ends aborts the process.
    """
    return any(thread.is_alive() for thread in _threads)
