"""Throughput, time and money of a whole run, from the seconds of a step."""

import dataclasses

from deepseek_jax.config import Config
from deepseek_jax.plan.machine import Machine
from deepseek_jax.plan.step_time import StepTime

DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class RunCost:
    """Throughput and cost of a run of `schedule.tokens` with full batches.

    Attributes:
      tokens_per_device_second: Tokens/s of a device.
      tflops_causal, tflops_full: Model TFLOP/s of a device with half of the attention scores, as
        the causal mask leaves, and with all.
      mfu_causal, mfu_full: The same as shares of the chip's 16-bit peak, as published systems count
        for FP8, too.
      days: Days of the run, without stops.
      device_hours: Hours of all devices.
      dollars: Their price; None without a price.
    """

    tokens_per_device_second: float
    tflops_causal: float
    tflops_full: float
    mfu_causal: float
    mfu_full: float
    days: float
    device_hours: float
    dollars: float | None


def run_cost(config: Config, machine: Machine, step: StepTime) -> RunCost:
    """Throughput and cost of the whole run of a config."""
    causal = step.flops_per_device_second(config, causal=True)
    full = step.flops_per_device_second(config, causal=False)
    seconds = config.schedule.tokens / step.tokens * step.total
    hours = seconds / 3600 * step.devices
    price = machine.chip.dollars_per_hour
    peak = machine.peak("bfloat16")
    return RunCost(
        tokens_per_device_second=step.tokens_per_device_second,
        tflops_causal=causal / 1e12,
        tflops_full=full / 1e12,
        mfu_causal=causal / peak,
        mfu_full=full / peak,
        days=seconds / DAY,
        device_hours=hours,
        dollars=None if price is None else hours * price,
    )
