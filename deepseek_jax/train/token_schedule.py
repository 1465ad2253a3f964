"""Schedules of section 4.2: pure functions of the steps taken and the tokens consumed."""

import dataclasses
import math

from deepseek_jax.config import BatchConfig, ScheduleConfig


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Hyperparameters of one optimiser step; floats, or scalar arrays inside a compiled step.

    Attributes:
      learning_rate: scale of the optimiser's direction.
      mtp_weight: lambda of equation 25.
      bias_speed: gamma, by which router biases move.
    """

    learning_rate: float
    mtp_weight: float
    bias_speed: float


def learning_rate(config: ScheduleConfig, *, step: int, tokens: int) -> float:
    """Five phases: linear warm-up in steps, constant, cosine, constant, final constant.

    Args:
      step: optimiser steps taken before this one.
      tokens: consumed before this step.
    """
    warm = min((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    if tokens >= config.final_start:
        rate = config.final_learning_rate
    elif tokens >= config.decay_end:
        rate = config.decayed_learning_rate
    elif tokens >= config.decay_start:
        done = (tokens - config.decay_start) / (config.decay_end - config.decay_start)
        span = config.learning_rate - config.decayed_learning_rate
        rate = config.decayed_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))
    else:
        rate = config.learning_rate
    return warm * rate


def hyper(config: ScheduleConfig, *, step: int, tokens: int) -> Hyper:
    """Hyperparameters of the step after `step` steps and `tokens` tokens."""
    late = tokens >= config.mtp_switch
    return Hyper(
        learning_rate=learning_rate(config, step=step, tokens=tokens),
        mtp_weight=config.late_mtp_weight if late else config.mtp_weight,
        bias_speed=0.0 if tokens >= config.bias_stop else config.bias_speed,
    )


def micro_batches(config: BatchConfig, tokens: int) -> int:
    """Micro-batches of the step after `tokens`; the batch ramp is linear in tokens."""
    done = min(tokens / config.ramp_tokens, 1.0) if config.ramp_tokens else 1.0
    wanted = config.ramp_sequences + done * (config.sequences - config.ramp_sequences)
    return max(round(wanted / config.micro_sequences), 1)


def fewest_micro_batches(config: BatchConfig) -> int:
    """Micro-batches of the smallest step of the ramp."""
    return max(min(config.sequences, config.ramp_sequences) // config.micro_sequences, 1)


def most_micro_batches(config: BatchConfig) -> int:
    """Micro-batches of the largest step of the ramp."""
    return max(config.sequences, config.ramp_sequences) // config.micro_sequences


def tokens_per_micro_batch(config: BatchConfig) -> int:
    """Tokens of a micro-batch over all devices."""
    return config.micro_sequences * config.length
