"""The time at which a result is ready, while the thread that made it is busy."""

import threading

import pytest

from deepseek_jax.runtime import background
from deepseek_jax.train.completions import Completions


class Result:
    """An array that is ready when a test says so, or fails then."""

    def __init__(self, error=None):
        self.event, self.error = threading.Event(), error

    def block_until_ready(self):
        assert self.event.wait(30)
        if self.error:
            raise self.error


def test_the_time_is_that_of_the_result():
    now = [3.0]
    completions = Completions(lambda: now[0])
    first, second = Result(), Result()
    times = [completions.expect(result) for result in (first, second)]
    assert not times[0].done()
    first.event.set()
    assert times[0].result(30) == 3.0
    now[0] = 5.0
    assert not times[1].done()
    second.event.set()
    now[0] = times[1].result(30) + 10  # later than the result
    assert times[1].result() == 5.0


def test_a_wait_is_known_so_that_an_error_ends_the_process_at_once():
    """A thread that returns from C++ code while the interpreter ends aborts the process."""
    completions, result = Completions(), Result()
    done = completions.expect(result)
    while not background.is_busy():
        assert not done.done()
    result.event.set()
    done.result(30)
    assert not background._waiting


def test_a_computation_that_fails_is_told_and_the_next_one_is_timed():
    completions = Completions(lambda: 1.0)
    bad, good = Result(RuntimeError("out of memory")), Result()
    times = [completions.expect(result) for result in (bad, good)]
    bad.event.set()
    good.event.set()
    with pytest.raises(RuntimeError, match="out of memory"):
        times[0].result(30)
    assert times[1].result(30) == 1.0
