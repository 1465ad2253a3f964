"""Parts of a run that need no compiled step: its start, and what ends it."""

import dataclasses
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs

from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import ConfigError
from deepseek_jax.errors import RunError
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.train import lock, loop, optimizer, starting, state


def test_a_second_run_is_refused_before_it_opens_its_data(text, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(loop, "TrainData", lambda *_, **__: pytest.fail("opened the data"))
    with lock.held(tmp_path / "run"):
        with pytest.raises(ConfigError, match=r"--workdir=.* is in use by process"):
            loop.train(runs.tiny(text), tmp_path / "run", screen=False)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("seen", ["a failed save", "a workdir that is gone"])
def test_what_one_process_sees_stops_all_of_them(monkeypatch, seen, count):
    error = RunError(seen)
    monkeypatch.setattr(jax, "process_count", lambda: count)

    def watch(*_):
        if seen != "a failed save":
            raise error

    run = object.__new__(loop.Run)
    run._store = SimpleNamespace(newest=4)
    run._saving = SimpleNamespace(failure=lambda: error if "save" in seen else None)
    run._config = SimpleNamespace(log=SimpleNamespace(every_steps=5))
    run._data = SimpleNamespace(corpus=None)
    run._own, run._problem = None, None
    run._stop = loop.processes.StopSignal()
    monkeypatch.setattr(loop.workdir, "watch", watch)

    def watched(number):
        run.watch(loop.Taken(number, 0, None, {}))

    due = 4 if seen == "a failed save" else 5  # a folder is looked for when a row is due
    if due == 5:
        watched(4)
        assert not run._stop.reached(4)
    if count == 1:
        with pytest.raises(RunError, match=f"^{seen}$"):
            watched(due)
        return
    watched(due)
    assert run._stop.reached(due)
    with pytest.raises(RunError, match=f"^{seen}$"):
        run._raise_problem()


def begun(config, tmp_path, said):
    """State at the start of a run, from the newest checkpoint of its workdir."""
    config = dataclasses.replace(config, mesh=meshes.resolve(config.mesh, 1))
    mesh, layout = meshes.build(config.mesh, jax.devices()[:1]), meshes.layout(config)
    adam = optimizer.build(config.optimizer)
    places = state.shardings(config, layout, mesh, adam)
    data = SimpleNamespace(restore=lambda _: None)
    with Store(tmp_path / "checkpoints", keep=1) as store, jax.set_mesh(mesh):
        told = SimpleNamespace(say=said.append)
        now = starting.start(config, places, adam, store, data, told).state
        step = store.newest + 1
        now = dataclasses.replace(now, step=np.int32(step) + now.step * 0)
        store.save(step, state.to_dict(now), {"tokens": 7, "data": {}})
    return now


def test_the_average_is_dropped_and_begun_on_resume(text, tmp_path):
    """optimizer.ema_decay may become 0, and more than 0 again."""
    on, off = (runs.tiny(text, optimizer={"ema_decay": decay}) for decay in (0.9, 0.0))
    said = []
    first = begun(on, tmp_path, said)
    assert said == [] and first.ema is not None
    assert begun(off, tmp_path, said).ema is None
    assert said[1:] == [
        "optimizer.ema_decay=0: the checkpoint's average of the weights is left out"
    ]
    assert begun(off, tmp_path, said).ema is None and len(said) == 3
    last = begun(on, tmp_path, said)
    assert said[4:] == ["the checkpoint has no average of the weights; it begins at step 3"]
    for average, weight in zip(
        jax.tree.leaves(last.ema), jax.tree.leaves(last.params), strict=True
    ):
        np.testing.assert_array_equal(average, weight)
        assert average.sharding.memory_kind == state.host_memory()


def test_a_changed_library_is_told_to_old_runs_too(text):
    def changed(_):
        raise ConfigError("data.path changed")

    data = SimpleNamespace(restore=changed)
    words = r"^data\.path changed\. data\.path='' is the running Python's library: resume with the"
    config = runs.tiny(text)
    with pytest.raises(ConfigError, match=r"^data\.path changed$"):
        starting.restore_data(data, {"data": {}}, config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=""))
    with pytest.raises(ConfigError, match=words):
        starting.restore_data(data, {"data": {}}, config)


def test_the_reader_is_imported_before_a_thread_opens_the_data(text, tmp_path, monkeypatch):
    order = []

    def opened(*_):
        order.append(("opened", threading.current_thread() is threading.main_thread()))
        raise RunError("enough")

    def imported():
        order.append(("imported", threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(loop.loader, "import_reader", imported)
    monkeypatch.setattr(loop, "_open_data", opened)
    with pytest.raises(RunError, match="enough"):
        loop.train(runs.tiny(text, mesh={"gpu": 8}), tmp_path / "run", screen=False)
    assert order == [("imported", True), ("opened", False)]
