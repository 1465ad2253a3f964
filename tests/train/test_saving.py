"""Saves that fail or are slow: the run stops, or goes on to the next one."""

import errno
import os
import threading
from types import SimpleNamespace

import pytest
from stored import example

from deepseek_jax.checkpoint import store as stores
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import CheckpointConfig
from deepseek_jax.errors import RunError, SaveFailed
from deepseek_jax.train import saving
from deepseek_jax.train.saving import Saving


def begun(folder, rule):
    """(saves, store, lines said, warnings) of a run that saves every second step."""
    said, warned = [], []
    report = SimpleNamespace(say=said.append, warn=warned.append)
    store = Store(folder, keep=3)
    config = CheckpointConfig(every_steps=2, keep=3, on_failure=rule, restarts=0)
    return Saving(config, store, report), store, said, warned


def save(saves, step, last=False):
    saves.save(step, example(step), {"step": step}, last)


@pytest.fixture
def disk(monkeypatch):
    """A disk that is full while `disk.full`, at the begin of a save or in its background."""
    state = SimpleNamespace(full="")
    whole = stores.ocp.save_async

    def begin(*arguments, **named):
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if state.full == "at once":
            raise error
        response = whole(*arguments, **named)
        if state.full:

            def fail():
                response.result()
                raise error

            return SimpleNamespace(result=fail)
        return response

    monkeypatch.setattr(stores.ocp, "save_async", begin)
    return state


@pytest.mark.parametrize("when", ["at once", "in the background"])
def test_a_failed_save_stops_the_run(tmp_path, disk, when):
    saves, store, _, warned = begun(tmp_path, "stop")
    save(saves, 2)
    disk.full = when
    words = r"checkpoint .*/4 cannot be written \(No space left .*; the newest checkpoint is step 2"
    with pytest.raises(SaveFailed, match=words):
        save(saves, 4)
        while (error := saves.failure()) is None:
            pass
        raise error
    assert store.steps()[0] == 2 and warned == []


@pytest.mark.parametrize("when", ["at once", "in the background"])
def test_a_failed_save_is_told_and_the_next_one_is_tried(tmp_path, disk, when):
    saves, store, _, warned = begun(tmp_path, "continue")
    save(saves, 2)
    store.settle()
    disk.full = when
    save(saves, 4)
    while not warned:
        assert saves.failure() is None
    [warning] = warned
    assert "checkpoint" in warning and "/4 cannot be written (No space left" in warning
    assert warning.endswith("Training goes on; a checkpoint is due every 2 steps")
    disk.full = ""
    save(saves, 6)
    store.settle()
    assert store.newest == 6 and {2, 6} <= set(store.steps())
    disk.full = when
    with pytest.raises(SaveFailed, match="/7 cannot be written"):  # the run's result would be lost
        save(saves, 7, last=True)
        store.settle()


def test_a_workdir_that_is_gone_stops_the_run_under_any_rule(tmp_path, disk):
    def gone():
        raise RunError("it was removed")

    saves, store, _, _ = begun(tmp_path, "continue")
    store._check = gone
    with pytest.raises(RunError, match="it was removed"):
        save(saves, 2)


@pytest.mark.parametrize("rule", ["stop", "continue"])
def test_a_slow_save_is_told(tmp_path, monkeypatch, rule):
    monkeypatch.setattr(saving, "SLOW_SECONDS", 0.01)
    saves, store, said, warned = begun(tmp_path, rule)
    slow, whole = threading.Event(), store._finish

    def finish(step, response):
        slow.wait(30)
        whole(step, response)

    store._finish = finish
    save(saves, 2)
    assert said == [] and store.writing == 2
    if rule == "stop":
        threading.Timer(0.3, slow.set).start()
    save(saves, 4)  # waits, or is left out
    ends = "training waits for it" if rule == "stop" else "step 4 is not saved"
    assert said == [f"the checkpoint of step 2 is still being written; {ends}"]
    slow.set()
    store.settle()
    save(saves, 6)
    store.settle()
    assert store.steps() == ([2, 4, 6] if rule == "stop" else [2, 6])
    assert warned == [] and store.writing is None
