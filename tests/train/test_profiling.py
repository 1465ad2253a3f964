"""Which steps a profile covers."""

import dataclasses

import pytest
import small

from deepseek_jax.config import ConfigError
from deepseek_jax.train import profiling, token_schedule


@pytest.fixture
def calls(monkeypatch):
    """Starts and stops of the profiler, in order."""
    made = []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda *_, **__: made.append("on"))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: made.append("off"))
    return made


def turns(profiler, calls, steps):
    for number in range(1, steps + 1):
        profiler.before_step()
        with profiler.step(number):
            calls.append(number)
        profiler.after_step()
    profiler.close()
    profiler.close()


@pytest.mark.parametrize(
    ("steps", "profiled", "want", "said"),
    [
        (5, 0, [1, 2, 3, 4, 5], []),
        (5, 2, [1, 2, "on", 3, 4, "off", 5], ["profile of 2 step(s)"]),
        (4, 2, [1, 2, "on", 3, 4, "off"], ["profile of 2 step(s)"]),
        (3, 2, [1, 2, "on", 3, "off"], ["profile of 1 step(s)"]),  # SIGTERM, or a resumed run
        (2, 2, [1, 2], ["no profile: this process took 2 step(s)"]),
    ],
)
def test_the_profile_follows_two_steps(tmp_path, calls, steps, profiled, want, said):
    lines = []
    turns(profiling.Profiler(tmp_path, profiled, lines.append), calls, steps)
    assert calls == want
    assert len(lines) == len(said) and all(a in b for a, b in zip(said, lines, strict=True))


def test_no_step_is_in_flight_where_a_trace_begins_or_ends(tmp_path, calls):
    profiler, alone = profiling.Profiler(tmp_path, 2, calls.append), []
    for number in range(1, 8):
        if profiler.is_due():
            alone.append(number)
        profiler.before_step()
        with profiler.step(number):
            pass
        if number > 1:  # the loop waits for a step while the next one is in flight
            profiler.after_step()
    assert alone == [3, 5]
    assert not profiling.Profiler(tmp_path, 0, calls.append).is_due()


@pytest.mark.parametrize(
    "name, want", [("start_trace", [1, 2, 3, 4]), ("stop_trace", [1, 2, "on", 3, 4])]
)
def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path, calls, monkeypatch, name, want):
    def fails(*_, **__):
        raise RuntimeError("FAILED_PRECONDITION: is not a directory")

    monkeypatch.setattr(profiling.jax.profiler, name, fails)
    lines = []
    turns(profiling.Profiler(tmp_path, 1, lines.append), calls, 4)
    assert calls == want
    [line] = lines
    assert "no profile" in line and "not a directory" in line


@pytest.mark.parametrize("steps", [0, -1])
def test_a_profile_has_a_step(steps):
    with pytest.raises(ConfigError, match=rf"profile_steps={steps}; expected at least 1"):
        profiling.check(small.config(), steps)


def test_a_profile_fits_into_the_run():
    whole = small.config()
    config = dataclasses.replace(whole, schedule=dataclasses.replace(whole.schedule, tokens=5000))
    taken = steps = 0
    while taken < config.schedule.tokens:
        count = token_schedule.micro_batches(config.batch, taken)
        taken += count * token_schedule.tokens_per_micro_batch(config.batch)
        steps += 1
    profiling.check(config, 1)
    profiling.check(config, steps - 2)
    with pytest.raises(ConfigError, match=rf"the run has {steps} .*at most {steps - 2}"):
        profiling.check(config, steps - 1)
