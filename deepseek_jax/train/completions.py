"""Times at which the devices end the steps that the loop has dispatched."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax

from deepseek_jax.runtime import background


class Completions:
    """Notes when results are ready, in a thread of its own, while the loop is busy.

    Where Python code of another thread runs, the time is late by up to `sys.getswitchinterval()`,
    5 ms.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._expected: queue.SimpleQueue[tuple[Any, Future[float]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def expect(self, result: Any) -> Future[float]:
        """The time when the arrays of `result` are ready, or the error of their computation.

        Results become ready in the order of the calls.
        """
        if self._thread is None:  # a daemon: a device that hangs must not keep Python from ending
            self._thread = threading.Thread(target=self._wait, daemon=True, name="completions")
            self._thread.start()
        ready: Future[float] = Future()
        self._expected.put((result, ready))
        return ready

    def _wait(self) -> None:
        while True:
            result, ready = self._expected.get()
            try:
                with background.waiting():
                    jax.block_until_ready(result)
                ready.set_result(self._clock())
            except Exception as error:
                ready.set_exception(error)
            del result, ready
