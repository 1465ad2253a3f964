"""Schedules over consumed tokens against the equations, at every boundary of two configs."""

import dataclasses

import numpy as np
import pytest
from equations import recipe

from configs import v3_671b, v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.train import token_schedule

CONFIGS = [v3_671b, v3_tiny]
BOUNDARIES = ("decay_start", "decay_end", "final_start", "bias_stop", "mtp_switch")

pytestmark = pytest.mark.parametrize("module", CONFIGS, ids=lambda m: m.__name__.split(".")[-1])


def parsed(module):
    return configs.parse(module.get_config())


def moments(config):
    """Tokens at, just before and just after every boundary, and in between."""
    at = [getattr(config, name) for name in BOUNDARIES] + [0, config.tokens]
    near = {max(tokens + by, 0) for tokens in at for by in (-1, 0, 1)}
    return sorted(near | {(config.decay_start + config.decay_end) // 2, config.decay_start // 3})


def test_learning_rate_after_the_warm_up(module):
    config = parsed(module).schedule
    for tokens in moments(config):
        step = config.warmup_steps + 100
        want = recipe.learning_rate(
            step + 1, tokens, peak=config.learning_rate, decayed=config.decayed_learning_rate,
            final=config.final_learning_rate, warmup_steps=config.warmup_steps,
            decay_start=config.decay_start, decay_end=config.decay_end,
            final_start=config.final_start,
        )  # fmt: skip
        assert token_schedule.learning_rate(config, step=step, tokens=tokens) == pytest.approx(want)


def test_learning_rate_during_the_warm_up(module):
    """The first step moves, and step number `warmup_steps` is the first at the peak."""
    config = parsed(module).schedule
    last = config.warmup_steps - 1
    for step in (0, 1, last // 2, last - 1, last, last + 1):
        want = recipe.learning_rate(
            step + 1, 0, peak=config.learning_rate, warmup_steps=config.warmup_steps
        )
        assert token_schedule.learning_rate(config, step=step, tokens=0) == pytest.approx(want)
    assert token_schedule.learning_rate(config, step=0, tokens=0) > 0
    assert token_schedule.learning_rate(config, step=last - 1, tokens=0) < config.learning_rate
    assert token_schedule.learning_rate(config, step=last, tokens=0) == config.learning_rate
    without = dataclasses.replace(config, warmup_steps=0)
    assert token_schedule.learning_rate(without, step=0, tokens=0) == config.learning_rate


def test_mtp_weight_and_bias_speed_switch(module):
    config = parsed(module).schedule
    for tokens in moments(config):
        now = token_schedule.hyper(config, step=7, tokens=tokens)
        assert now.mtp_weight == recipe.mtp_weight(tokens, switch=config.mtp_switch)
        want = recipe.bias_speed(tokens, speed=config.bias_speed, stop=config.bias_stop)
        assert now.bias_speed == want
        assert now.learning_rate == token_schedule.learning_rate(config, step=7, tokens=tokens)


def test_batch_ramp(module):
    batch = parsed(module).batch
    ramp = [int(share * batch.ramp_tokens) for share in np.linspace(0, 1.5, 301)]
    counts = [token_schedule.micro_batches(batch, tokens) for tokens in ramp]
    assert counts == sorted(counts)
    assert counts[0] * batch.micro_sequences == batch.ramp_sequences
    assert token_schedule.micro_batches(batch, batch.ramp_tokens) == batch.sequences // (
        batch.micro_sequences
    )
    assert counts[-1] == token_schedule.most_micro_batches(batch)
    for tokens, count in zip(ramp, counts, strict=True):
        exact = recipe.batch_sequences(
            tokens, start=batch.ramp_sequences, end=batch.sequences, over=batch.ramp_tokens
        )
        assert abs(count * batch.micro_sequences - exact) <= batch.micro_sequences / 2
    assert token_schedule.tokens_per_micro_batch(batch) == batch.micro_sequences * batch.length


def test_batch_has_at_least_one_micro_batch_and_may_not_ramp(module):
    batch = parsed(module).batch
    small = dataclasses.replace(batch, ramp_sequences=1, micro_sequences=batch.sequences)
    assert token_schedule.micro_batches(small, 0) == 1
    flat = dataclasses.replace(batch, ramp_tokens=0)
    assert token_schedule.micro_batches(flat, 0) * batch.micro_sequences == batch.sequences


def test_scaled_schedule_keeps_proportions(module):
    config = module.get_config()
    before = config.copy_and_resolve_references()
    v3_671b.scale_schedule(config, tokens=10**9)
    assert config.schedule.tokens == 10**9
    for name in BOUNDARIES:
        share = before.schedule[name] / before.schedule.tokens
        assert config.schedule[name] / 10**9 == pytest.approx(share, abs=1e-9)
    share = before.batch.ramp_tokens / before.schedule.tokens
    assert config.batch.ramp_tokens / 10**9 == pytest.approx(share, abs=1e-9)
