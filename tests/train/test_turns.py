"""Order of a run's turns, on a device, a data source and a report that only a clock knows."""

from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import runs

from deepseek_jax.train import loop, profiling, starting, state, system_metrics
from deepseek_jax.train.anomaly_rule import AnomalyRule
from deepseek_jax.train.saving import Saving

TOKENS = 256  # of a step


class Metric:
    """A number that is there when its step is done: to read it turns the clock on."""

    def __init__(self, emulated, number, ready, value):
        self.emulated, self.number, self.ready, self.value = emulated, number, ready, value

    def block_until_ready(self):
        self.emulated.now = max(self.emulated.now, self.ready)
        self.emulated.events.append(f"wait {self.number}")

    def __array__(self, dtype=None, copy=None):
        emulated = self.emulated
        emulated.now = max(emulated.now, self.ready)
        if self.number not in emulated.seen:
            emulated.seen.add(self.number)
            emulated.events.append(f"read {self.number}")
        return np.asarray(self.value)


class Emulated:
    """A `loop.Run` whose parts take seconds of a clock, and that notes what happens in order."""

    blocks = False  # whether the call of a step returns when the step is done

    def __init__(
        self,
        monkeypatch,
        *,
        steps,
        device=1.0,
        data=0.0,
        report=0.0,
        save=0.0,
        every=1000,
        nan=0,
        backend="gpu",
        anomaly=None,
    ):
        monkeypatch.setattr(loop.jax, "default_backend", lambda: backend)
        self.events, self.seen, self.now, self.free = [], set(), 0.0, 0.0
        self.device, self.nan = device, nan
        self.config = runs.tiny(
            runs.TINY,
            schedule={"tokens": steps * TOKENS},
            batch={"ramp_sequences": 8, "sequences": 8, "length": 32},
            checkpoint={"every_steps": every},
            anomaly={"loss_score": 0.0, "grad_norm_score": 0.0, **(anomaly or {})},
        )
        run = self.run = object.__new__(loop.Run)
        run.steps, run.tokens = 0, 0
        run.state = state.TrainState(0, {}, {}, (), None)
        run._config, run._own, run._problem, run._tokens_place = self.config, None, None, None
        run._compiled_step = self.step
        run._stop = loop.processes.StopSignal()
        run._system = system_metrics.SystemMetrics(
            self.config,
            devices=1,
            local_devices=[SimpleNamespace(device_kind="cpu", memory_stats=lambda: None)],
            clock=lambda: self.now,
        )
        run._completions = SimpleNamespace(expect=self.expect)
        drawn = iter(range(1, 1000))
        self.drawn = 0

        def take(*_):
            self.drawn = next(drawn)
            self.spend(data, f"data {self.drawn}")

        run._data = SimpleNamespace(
            state=lambda: {"consumed": self.drawn}, corpus=None, facts=SimpleNamespace(tokens=1)
        )
        run._report = SimpleNamespace(
            begin=lambda *_: None,
            rewind=lambda *_: None,
            draw=lambda: None,
            say=lambda _: None,
            anomaly=lambda found, action: self.events.append(f"{found.kind} {action}"),
            step=lambda row: self.spend(report, f"row {row['step']}"),
        )
        run._store = SimpleNamespace(
            newest=0,
            steps=lambda: [],
            writing=None,
            done=lambda _: True,
            failure=lambda: None,
            settle=lambda: None,
            save=lambda step, values, meta: self.spend(save, f"save {step} {values} {meta}"),
        )
        run._saving = Saving(self.config.checkpoint, run._store, run._report)
        run._rule = AnomalyRule(self.config, run._store, run._report, lambda: None)
        monkeypatch.setattr(loop.batches, "take", take)
        monkeypatch.setattr(loop.workdir, "watch", lambda *_: None)
        monkeypatch.setattr(loop.state, "copy_to_host", lambda now: f"copy of {now.step}")
        monkeypatch.setattr(loop.state, "to_dict", lambda now: getattr(now, "step", now))

    def spend(self, seconds, event):
        self.events.append(event)
        self.now += seconds

    def step(self, now, *_):
        """The devices begin it once the step before is done."""
        self.free = max(self.now, self.free) + self.device
        if self.blocks:
            self.now = self.free
        number = now.step + 1
        self.events.append(f"step {number}")
        loss = float("nan") if number == self.nan else 2.0
        values = {"loss": loss, "grad_norm": 1.0, "max_violation": [0.5]}
        metrics = {name: Metric(self, number, self.free, value) for name, value in values.items()}
        return state.TrainState(number, {}, {}, (), None), metrics

    def expect(self, metrics):
        ready = Future()
        ready.set_result(metrics["loss"].ready)
        return ready

    def to_the_end(self, profiler=None):
        return self.run.to_the_end(profiler or profiling.Profiler(runs.ROOT, 0, print))


def saved(step, values, consumed, emulated):
    """The event of a save: the state after a step, and the tokens and data of no later one."""
    meta = {"tokens": step * TOKENS, "data": {"consumed": consumed}}
    return f"save {step} {values} {meta | loop.workdir.of_this_python(emulated.config)}"


def test_a_step_is_dispatched_before_the_metrics_of_the_step_before_are_read(monkeypatch):
    run = Emulated(monkeypatch, steps=4, every=2)
    summary = run.to_the_end()
    assert run.events == [
        "data 1", "step 1", "data 2",
        "step 2", "data 3", "read 1", "row 1",
        "step 3", "data 4", "read 2", "row 2", saved(2, "copy of 2", 2, run),
        "step 4", "read 3", "row 3",
        "read 4", "row 4", saved(4, 4, 4, run),
    ]  # fmt: skip
    assert (summary["step"], summary["tokens"], summary["stopped"]) == (4, 4 * TOKENS, False)


def test_on_a_cpu_one_step_is_in_flight_and_rows_are_written_beside_it(monkeypatch):
    run = Emulated(monkeypatch, steps=3, report=0.9, data=0.9, backend="cpu")
    summary = run.to_the_end()
    order = list(dict.fromkeys(event for event in run.events if event[:4] != "save"))
    assert order == [
        "data 1", "step 1", "data 2",
        "wait 1", "step 2", "data 3", "read 1", "row 1",
        "wait 2", "step 3", "read 2", "row 2",
        "read 3", "row 3",
    ]  # fmt: skip
    # 0.9 s before the first step, and 0.8 s by which data and row take longer than the second.
    assert summary["idle_share"] == pytest.approx(1.7 / 4.7)


def test_nothing_is_taken_where_no_tokens_are_left(monkeypatch):
    run = Emulated(monkeypatch, steps=4)
    run.run.steps, run.run.tokens = 4, 4 * TOKENS
    assert run.to_the_end() == {
        "step": 4, "tokens": 4 * TOKENS, "stopped": False, "skipped_steps": 0, "rewinds": 0,
    }  # fmt: skip
    assert run.events == []


def test_a_call_that_runs_its_step_is_not_idle(monkeypatch):
    """On the CPUs of several processes; data and rows are then beside no step."""
    run = Emulated(monkeypatch, steps=4, data=0.5, backend="cpu")
    run.blocks = True
    summary = run.to_the_end()
    assert (summary["step_seconds"], summary["idle_share"]) == (1.5, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    "slow, share",
    [
        ({}, 0.0),
        ({"data": 0.9}, 0.009),  # before the first step alone
        ({"data": 3.0}, 2 / 3),
        ({"report": 0.9}, 0.0),
        ({"report": 4.0}, 3 / 4),
        ({"report": 0.5, "save": 0.4, "data": 0.05}, 0.0005),
        ({"report": 0.5, "save": 0.7, "every": 1}, 0.2 / 1.2),
    ],
)
def test_the_idle_share_is_what_the_host_takes_longer_than_the_device(monkeypatch, slow, share):
    summary = Emulated(monkeypatch, steps=100, device=1.0, **slow).to_the_end()
    assert summary["idle_share"] == pytest.approx(share, abs=0.01)
    assert summary["step_seconds"] == pytest.approx(1 / (1 - share), rel=0.02)


def test_a_step_that_is_not_finite_leaves_no_row_and_no_checkpoint(monkeypatch):
    run = Emulated(monkeypatch, steps=6, every=1, nan=3)
    words = (
        r"^step 3 has loss nan, gradient norm 1, on sequences -5 to 2 of the training data; there "
        r"is no checkpoint\. Lower"
    )
    with pytest.raises(loop.NotFinite, match=words):
        run.to_the_end()
    assert "step 4" in run.events and "step 5" not in run.events
    assert [event.split()[1] for event in run.events if event[:3] in ("row", "sav")] == list("1122")


def rewinding(monkeypatch, **how):
    """A run of six steps that saves each second one, and whose fifth is bad once."""
    run = Emulated(monkeypatch, steps=6, every=2, anomaly={"rule": "rewind"}, **how)

    def save(step, values, meta):
        run.run._store.newest = step
        run.spend(0, f"save {step}")

    def start(*_, position):
        step = run.run._store.newest
        run.nan = 0
        run.events.append(f"back to {step}, data after {position['consumed']}")
        return starting.Beginning(
            state.TrainState(step, {}, {}, (), None), step, step * TOKENS, None
        )

    run.run._store.save = save
    run.run._programs = SimpleNamespace(places=None, adam=None)
    monkeypatch.setattr(starting, "start", start)
    return run


def test_a_rewind_drops_the_step_in_flight_and_goes_on_from_the_checkpoint(monkeypatch):
    run = rewinding(monkeypatch, nan=5)
    summary = run.to_the_end()
    after = run.events.index("step 5")
    assert run.events[after:] == [
        "step 5", "data 6", "read 4", "row 4", "save 4",
        "step 6", "read 5",  # the sixth is dropped
        "back to 4, data after 5", "not finite rewound to step 4", "data 7",
        "step 5", "data 8",
        "step 6", "row 5",
        "read 6", "row 6", "save 6",
    ]  # fmt: skip
    assert (summary["step"], summary["tokens"], summary["rewinds"]) == (6, 6 * TOKENS, 1)
    assert run.run._rule.undone == 1  # so that numbers of turns, which all processes count, rise


def test_a_signal_at_an_anomaly_ends_the_run_at_the_checkpoint(monkeypatch):
    run = rewinding(monkeypatch, nan=5)
    heard = run.run._store.save

    def save(step, *rest):
        heard(step, *rest)
        run.run._stop.request()

    run.run._store.save = lambda step, *rest: save(step, *rest) if step == 4 else heard(step, *rest)
    summary = run.to_the_end()
    assert "step 6" not in run.events and run.events[-1] == "not finite rewound to step 4"
    assert (summary["step"], summary["stopped"]) == (4, True)


def test_a_signal_ends_the_run_after_the_step_in_flight(monkeypatch):
    run = Emulated(monkeypatch, steps=9)
    heard = run.run._report.step

    def step(row):
        heard(row)
        if row["step"] == 2:
            run.run._stop.request()

    run.run._report.step = step
    summary = run.to_the_end()
    assert (summary["step"], summary["tokens"], summary["stopped"]) == (3, 3 * TOKENS, True)
    # The batch of a fourth step was drawn, and is not in the checkpoint.
    last = ["data 4", "read 2", "row 2", "read 3", "row 3", saved(3, 3, 3, run)]
    assert run.events[-6:] == last


def test_a_trace_begins_and_ends_without_a_step_in_flight(monkeypatch, tmp_path):
    run = Emulated(monkeypatch, steps=5)
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(
            profiling.jax.profiler, name, lambda *_, name=name, **__: run.spend(100, name)
        )
    summary = run.to_the_end(profiling.Profiler(tmp_path, 1, lambda _: None))
    order = [event for event in run.events if event[:4] in ("step", "read", "star", "stop")]
    assert order == [
        "step 1", "step 2", "read 1", "read 2",
        "start_trace", "step 3", "read 3", "stop_trace",
        "step 4", "step 5", "read 4", "read 5",
    ]  # fmt: skip
    assert summary["step_seconds"] == 1 and summary["idle_share"] == 0
