"""Times, FLOP/s and memory of a run, on a clock that the tests turn."""

import dataclasses
import types
from concurrent.futures import Future

import pytest
import small

from deepseek_jax.model.flops import training_flops_per_token
from deepseek_jax.train.system_metrics import SystemMetrics

H100 = "NVIDIA H100 80GB HBM3"


def config_of(recipe="bfloat16"):
    config = small.config()
    precision = dataclasses.replace(config.precision, recipe=recipe)
    return dataclasses.replace(config, precision=precision)


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


def device(kind=H100, **stats):
    return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats or None)


def measured(clock, config=None, devices=2, local=None):
    local = local or [device(bytes_in_use=3, peak_bytes_in_use=7)]
    return SystemMetrics(config or config_of(), devices=devices, local_devices=local, clock=clock)


def dispatch(metrics, ready, tokens=100):
    """A step that is done at the time `ready`."""
    future = Future()
    future.set_result(ready)
    metrics.dispatched(tokens, future)


def take_step(metrics, clock, *, data=1.0, work=3.0, tokens=100):
    with metrics.waiting_for_data():
        clock.advance(data)
    dispatch(metrics, clock() + work, tokens)
    clock.advance(work)
    metrics.done()


def test_a_row_covers_the_steps_since_the_row_before():
    clock, config = Clock(), config_of()
    metrics = measured(clock)
    take_step(metrics, clock, data=2.0)
    first = metrics.row()
    take_step(metrics, clock)
    take_step(metrics, clock, data=3.0, tokens=200)
    row = metrics.row()
    assert (first["step_seconds"], first["data_seconds"]) == (5.0, 2.0)
    assert (row["step_seconds"], row["data_seconds"]) == (5.0, 2.0)
    assert first["tokens_per_second"] == 20.0 and row["tokens_per_second"] == 30.0
    per_token = training_flops_per_token(config.model, config.batch.length)
    assert row["model_flops_per_second"] == pytest.approx(30 * per_token / 2)
    assert row["mfu"] == pytest.approx(15 * per_token / 989.5e12)
    summary = metrics.summary()
    assert summary["step_seconds"] == 5.0 and summary["tokens_per_second"] == 400 / 15


def test_compilation_is_in_the_first_row_and_the_summary_and_no_step():
    clock = Clock()
    metrics = measured(clock)
    with metrics.compiling():
        clock.advance(60.0)
    take_step(metrics, clock)
    first = metrics.row()
    with metrics.excluded():
        clock.advance(9.0)
    take_step(metrics, clock)
    second = metrics.row()
    assert first["compile_seconds"] == 60.0 and "compile_seconds" not in second
    assert first["step_seconds"] == second["step_seconds"] == 4.0
    assert metrics.summary()["compile_seconds"] == 60.0


def test_idle_is_the_time_from_the_end_of_a_step_to_the_next_dispatch():
    clock = Clock()
    metrics = measured(clock)
    dispatch(metrics, clock() + 10)
    clock.advance(4)
    dispatch(metrics, clock() + 16)  # 6 seconds before the first is done
    clock.advance(3)
    metrics.done()
    clock.advance(15)  # the second is done after 13 of them
    dispatch(metrics, clock() + 8)
    metrics.done()
    metrics.done()
    row = metrics.row()
    assert row["step_seconds"] == 10 and row["idle_share"] == pytest.approx(2 / 30)


def test_time_is_excluded_only_where_no_step_is_in_flight():
    clock = Clock()
    metrics = measured(clock)
    clock.advance(1)
    with metrics.excluded():
        clock.advance(100)
    dispatch(metrics, clock() + 9)
    with metrics.excluded():
        clock.advance(9)
    metrics.done()
    row = metrics.row()
    assert (row["step_seconds"], row["idle_share"]) == (10, 0.1)


def test_the_order_of_the_fields_is_fixed():
    clock = Clock()
    metrics = measured(clock)
    with metrics.compiling():
        clock.advance(1.0)
    take_step(metrics, clock)
    assert list(metrics.row()) == [
        "tokens_per_second", "step_seconds", "data_seconds", "idle_share", "compile_seconds",
        "model_flops_per_second", "mfu", "device_bytes_in_use", "device_bytes_peak",
    ]  # fmt: skip


def test_memory_is_that_of_the_fullest_device():
    clock = Clock()
    local = [device(bytes_in_use=3, peak_bytes_in_use=7), device(bytes_in_use=5)]
    metrics = measured(clock, local=local)
    take_step(metrics, clock)
    row = metrics.row()
    assert (row["device_bytes_in_use"], row["device_bytes_peak"]) == (5, 7)


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [("cpu", "bfloat16"), ("NVIDIA B300", "bfloat16"), (H100, "float32")],
)
def test_what_is_not_known_is_absent(kind, recipe):
    clock = Clock()
    metrics = measured(clock, config_of(recipe), local=[device(kind)])
    take_step(metrics, clock)
    assert metrics.row().keys() == {
        "tokens_per_second", "step_seconds", "data_seconds", "idle_share",
        "model_flops_per_second",
    }  # fmt: skip


def test_a_run_without_a_step_has_no_fields():
    assert measured(Clock()).summary() == {}
