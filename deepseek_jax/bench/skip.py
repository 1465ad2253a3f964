"""Cost of `anomaly.rule=skip`: a step that can leave its update out, over one that cannot.

The model is that of `bench train`. Both steps run in turns in one process.
"""

import dataclasses
from typing import Any

import numpy as np

from deepseek_jax.bench import train
from deepseek_jax.config import Config


def measure(config: Config, *, rounds: int = 8, steps: int = 4) -> dict[str, Any]:
    """Measures steps under both rules.

    Returns:
      Median seconds of a step, bytes of the program's temporaries, and as `skip_over_stop` the
      median of the rounds' ratios, with the least and the greatest of them.
    """
    config = train.sized(config)
    steppers = {
        rule: train.Stepper.of(
            dataclasses.replace(config, anomaly=dataclasses.replace(config.anomaly, rule=rule))
        )
        for rule in ("stop", "skip")
    }
    seconds: dict[str, list[float]] = {rule: [] for rule in steppers}
    for stepper in steppers.values():
        stepper.run()
    for _ in range(rounds):
        for rule, stepper in steppers.items():
            seconds[rule].append(float(np.median([stepper.run() for _ in range(steps)])))
    ratios = np.array(seconds["skip"]) / np.array(seconds["stop"])
    rows = [
        {
            "rule": rule,
            "step_seconds": float(np.median(seconds[rule])),
            "temporary_bytes": stepper.temporary_bytes,
        }
        for rule, stepper in steppers.items()
    ]
    return {
        "skip_over_stop": float(np.median(ratios)),
        "least": float(ratios.min()),
        "greatest": float(ratios.max()),
        "steps": rows,
    }
