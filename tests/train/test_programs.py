"""Programs of a run: compiled from shapes, in threads where a run is alone, and once."""

import dataclasses
import threading
import weakref
from concurrent.futures import Future
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
import runs

from deepseek_jax import endings
from deepseek_jax.config import ConfigError
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.runtime import background
from deepseek_jax.train import programs, starting, state, token_schedule
from deepseek_jax.train.programs import OnDemand, RunPrograms
from deepseek_jax.train.step import make_step


def of(tmp_path, **mesh):
    config = runs.tiny(tmp_path, mesh=mesh)
    sizes = meshes.resolve(config.mesh, 1)
    config = dataclasses.replace(config, mesh=sizes)
    return config, RunPrograms(
        config, meshes.layout(config), meshes.build(config.mesh, jax.devices()[:1])
    )


def test_an_abstract_state_is_that_of_a_fresh_one(tmp_path):
    config, made = of(tmp_path)
    with jax.set_mesh(made.mesh):
        like = state.abstract(config, made.places, made.adam)
        fresh = state.initialise(config, made.places, made.adam)
    kinds = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding), tree)
        for tree in (like, fresh)
    ]
    assert jax.tree.structure(like) == jax.tree.structure(fresh)
    assert jax.tree.leaves(kinds[0]) == jax.tree.leaves(kinds[1])


def test_a_thread_lowers_the_step_of_the_arrays_that_it_will_take(tmp_path, monkeypatch):
    config, made = of(tmp_path)
    lowered = []

    class Caught(Exception):
        pass

    def caught(self, *_, **__):
        lowered.append(self.as_text())
        raise Caught

    monkeypatch.setattr(jax.stages.Lowered, "compile", caught)
    made.step.begin()
    with pytest.raises(Caught):
        made.step.result()
    monkeypatch.undo()
    batch, hyper = config.batch, token_schedule.hyper(config.schedule, step=0, tokens=0)
    shape = (token_schedule.most_micro_batches(batch), batch.micro_sequences, batch.length + 1)
    with jax.set_mesh(made.mesh):
        now = dataclasses.replace(state.initialise(config, made.places, made.adam), ema=None)
        tokens = jax.device_put(np.zeros(shape, np.int32), made.tokens_place)
        step = jax.jit(
            make_step(config, meshes.layout(config), made.mesh, made.adam),
            donate_argnums=0,
            out_shardings=(dataclasses.replace(made.places, ema=None), None),
        )
        arguments = tokens, np.int32(1), jax.tree.map(np.float32, hyper)
        assert lowered == [step.lower(now, *arguments).as_text()]


def test_the_compiled_score_takes_a_fresh_state_and_its_average(tmp_path):
    config, made = of(tmp_path)
    rng = np.random.default_rng(0)
    shape = (3, config.batch.length + 1)
    sequences = rng.integers(0, config.model.vocab, shape).astype(np.int32)
    valid = np.ones((3, config.batch.length), bool)
    made.score.begin()
    with jax.set_mesh(made.mesh):
        now = state.initialise(config, made.places, made.adam)
        average = jax.device_put(
            now.ema, jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), now.ema)
        )
        score = made.score.result()
        first, second = (score(w, now.bias, sequences, valid) for w in (now.params, average))
    assert first == second and first.targets == valid.size
    assert first.nats / first.targets == pytest.approx(np.log(config.model.vocab), rel=0.05)


def test_a_value_is_made_once_in_a_thread_and_its_error_is_raised_where_it_is_asked_for():
    where = []
    later = OnDemand(lambda: where.append(threading.current_thread().name), "there")
    later.begin()
    later.begin()
    later.result()
    later.result()
    assert where == ["there"]

    def fails():
        raise ConfigError("no memory")

    failing = OnDemand(fails, "fails")
    failing.begin()
    failing.wait()  # raises nothing
    with pytest.raises(ConfigError, match=r"^no memory$"):
        failing.result()


@pytest.mark.parametrize("several", ["processes", "GPUs"])
def test_nothing_begins_in_a_thread_where_order_or_quiet_matters(tmp_path, monkeypatch, several):
    _, made = of(tmp_path)
    if several == "processes":
        monkeypatch.setattr(jax, "process_count", lambda: 2)
    else:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    begun = []
    monkeypatch.setattr(programs, "in_background", lambda *given: begun.append(given))
    made.begin(steps=True)
    made.begin(steps=False)
    assert not begun


@pytest.mark.parametrize(
    ("text", "meta", "begun"),
    [
        ("bad", None, []),
        ("good", None, [{"steps": True}]),
        ("good", {"tokens": 512}, [{"steps": True}]),
        ("good", {"tokens": 1024}, [{"steps": False}]),
        ("good", {"weights_only": True, "tokens": 1024}, [{"steps": True}]),
    ],
)
def test_compiling_begins_with_text_that_is_not_bad(text, meta, begun):
    opening, seen = Future(), []
    if text == "bad":
        opening.set_exception(ConfigError("no such text"))
    else:
        opening.set_result(None)
    config = SimpleNamespace(schedule=SimpleNamespace(tokens=1024))
    made = SimpleNamespace(begin=lambda **how: seen.append(how))
    assert starting.meanwhile(opening, config, made, meta) is None
    assert seen == begun


def test_a_state_is_built_beside_slow_text(tmp_path, monkeypatch):
    config, made = of(tmp_path)
    monkeypatch.setattr(made, "begin", lambda **_: None)
    monkeypatch.setattr(starting, "_GRACE", 0.0)
    fresh = starting.meanwhile(Future(), config, made, None)
    with jax.set_mesh(made.mesh):
        want = state.initialise(config, made.places, made.adam)
    chex.assert_trees_all_equal(jax.device_get(fresh), jax.device_get(want))


def test_a_command_that_fails_while_a_thread_works_leaves_at_once(monkeypatch):
    """Else the thread would return from the compiler while the interpreter ends."""
    monkeypatch.setattr(background, "_threads", weakref.WeakSet())
    go, error = threading.Event(), ConfigError("a row without text")
    assert not endings.at_once(error)
    done = background.in_background(lambda: go.wait(30), "waits")
    assert endings.at_once(error)
    go.set()
    assert done.result(30)
    for thread in threading.enumerate():
        if thread.name == "waits":
            thread.join(30)
    assert not endings.at_once(error)
