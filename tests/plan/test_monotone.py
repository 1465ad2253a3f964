"""Properties of planned times: no worse machine is faster, and micro-batches fill bubbles."""

import dataclasses
import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_v3 import SMALL

from deepseek_jax.plan import candidates, machine_lookup, search, step_time
from deepseek_jax.plan.memory_floor import is_traced
from deepseek_jax.plan.peak import peak_bytes

DEVICES = 16


@functools.cache
def layouts():
    """Layouts that the search considers; of few sequences, whose steps take less to simulate."""
    few = dataclasses.replace(SMALL.batch, sequences=128, ramp_sequences=128)
    config = dataclasses.replace(SMALL, batch=few)
    return tuple(candidates.candidates(config, DEVICES, machine_lookup.find("h800")))


def seconds(config, machine, execution):
    """(step, the pipeline or the passes in it, the optimizer)."""
    times = step_time.times(config, machine_lookup.with_messages(machine, config))
    found = step_time.step_time(times, execution)
    return found.total, found.pipeline, found.update


def worse(machine, part, field, factor):
    """The machine with one number of its chip, network or efficiencies times a factor."""
    changed = getattr(machine, part)
    if field == "peak_flops_per_s":
        slower = {name: factor * rate for name, rate in changed.peak_flops_per_s.items()}
    else:
        slower = factor * getattr(changed, field)
    changed = dataclasses.replace(changed, **{field: slower})
    return dataclasses.replace(machine, **{part: changed})


RATES = (
    ("chip", "peak_flops_per_s"),
    ("chip", "hbm_bytes_per_s"),
    ("network", "nvlink_effective_bytes_per_s"),
    ("network", "infiniband_effective_bytes_per_s"),
    ("efficiency", "matmul_fp8"),
    ("efficiency", "weight_gradient_fp8"),
    ("efficiency", "grouped_weight_gradient_fp8"),
    ("efficiency", "matmul_bf16"),
    ("efficiency", "grouped_bf16"),
    ("efficiency", "attention_forward"),
    ("efficiency", "attention_backward"),
    ("efficiency", "quantise_forward"),
    ("efficiency", "pointwise_backward"),
    ("efficiency", "streaming"),
    ("efficiency", "all_to_all"),
)
ANY_LAYOUT = st.integers(0, 10**6).map(lambda number: layouts()[number % len(layouts())])
EXECUTIONS = st.sampled_from(search.EXECUTIONS)
FACTORS = st.floats(0.05, 0.95)


@settings(max_examples=30, deadline=None)
@given(config=ANY_LAYOUT, execution=EXECUTIONS, rate=st.sampled_from(RATES), factor=FACTORS)
def test_no_slower_part_makes_a_step_faster(config, execution, rate, factor):
    machine = machine_lookup.find("h800")
    base = seconds(config, machine, execution)
    slow = seconds(config, worse(machine, *rate, factor), execution)
    for before, after in zip(base, slow, strict=True):
        assert after >= before * (1 - 1e-12)


@settings(max_examples=15, deadline=None)
@given(config=ANY_LAYOUT, execution=EXECUTIONS, factor=st.floats(1.05, 20.0))
def test_longer_waits_and_half_contractions_never_help(config, execution, factor):
    machine = machine_lookup.find("h800")
    base = seconds(config, machine, execution)[0]
    for field in ("synchronisation_s", "half_contraction_fp8", "half_contraction_bf16"):
        slow = seconds(config, worse(machine, "efficiency", field, factor), execution)[0]
        assert slow >= base * (1 - 1e-12)


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: rate[1])
def test_each_rate_matters_somewhere(rate):
    """A rate that no layout feels would pass the property above for nothing."""
    machine = machine_lookup.find("h800")
    slower = worse(machine, *rate, 0.05)
    for config in layouts()[:: len(layouts()) // 40]:
        if (
            seconds(config, slower, "asynchronous")[0]
            > 1.001 * (seconds(config, machine, "asynchronous")[0])
        ):
            return
    pytest.fail("no layout is slower")


def with_batches(config, many):
    """The config with `many` micro-batches of the same size in a step."""
    sequences = many * config.batch.micro_sequences
    batch = dataclasses.replace(config.batch, sequences=sequences, ramp_sequences=sequences)
    return dataclasses.replace(config, batch=batch)


@settings(max_examples=30, deadline=None)
@given(
    config=ANY_LAYOUT.filter(lambda config: config.mesh.pipe > 1),
    execution=EXECUTIONS,
    many=st.integers(4, 40),
    more=st.integers(1, 20),
)
def test_more_micro_batches_have_a_smaller_share_of_bubbles(config, execution, many, more):
    """Mean share over ranks; an even number on each side, at least as many as the schedule runs."""
    least = 2 * config.mesh.pipe
    shares = []
    for count in (2 * many + least, 2 * (many + more) + least):
        machine = machine_lookup.with_messages(machine_lookup.find("h800"), config)
        step = step_time.step_time(step_time.times(with_batches(config, count), machine), execution)
        shares.append(sum(rank.bubble for rank in step.ranks) / len(step.ranks) / step.pipeline)
    assert shares[1] <= shares[0] * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(config=ANY_LAYOUT, execution=EXECUTIONS, many=st.integers(1, 40), more=st.integers(1, 20))
def test_more_micro_batches_take_longer(config, execution, many, more):
    machine = machine_lookup.with_messages(machine_lookup.find("h800"), config)
    few, several = (
        step_time.step_time(step_time.times(with_batches(config, count), machine), execution)
        for count in (2 * many, 2 * (many + more))
    )
    assert several.total >= few.total
    assert several.tokens_per_device_second >= few.tokens_per_device_second * (1 - 1e-9)


@settings(max_examples=15, deadline=None)
@given(config=ANY_LAYOUT.filter(lambda config: not is_traced(config)))
def test_recomputing_more_never_needs_more_memory(config):
    """From nothing computed again to everything, where the closed form says what is kept."""
    policies = ("none", "report", "attention", "full")
    start = policies.index(config.layout.recompute)
    found = [
        peak_bytes(
            dataclasses.replace(config, layout=dataclasses.replace(config.layout, recompute=policy))
        )
        for policy in policies[start:]
    ]
    assert found == sorted(found, reverse=True)
