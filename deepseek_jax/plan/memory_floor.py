"""Lower bound of the peak memory of a layout, in a few milliseconds where the estimate takes more.

The estimate of some layouts without a pipeline reads residuals from a trace, which takes seconds.
"""

import dataclasses
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.plan.device_memory import ACTIVATIONS, DeviceMemory, device_memory
from deepseek_jax.plan.memory import Memory, memory


class MemoryFloor:
    """Lower bounds of configs that differ in mesh, layout, batch and precision alone."""

    def __init__(self) -> None:
        self._used: dict[tuple[Any, ...], Memory] = {}

    def bytes(self, config: Config) -> int:
        """Bytes that a device needs at least: state, weights and gradients, and what layers keep.

        Keeping all keeps no less than the report's recomputation; where there is no pipeline it is
        taken from there.
        """
        layout = config.layout
        key = (config.mesh, layout.pipeline, layout.zero, config.precision.recipe)
        if key not in self._used:
            self._used[key] = memory(config)
        used = self._used[key]
        if config.mesh.pipe > 1:
            return used.state + used.compute_weights + used.gradients
        return used.state + used.compute_weights + _closed_form(config).items[ACTIVATIONS]


def closed_form_bytes(config: Config) -> int:
    """Peak bytes of a layout whose estimate needs a trace, without one.

    What is kept without recomputation beyond the report's is left out.
    """
    return _closed_form(config).peak


def _closed_form(config: Config) -> DeviceMemory:
    layout = config.layout
    policy = "report" if layout.recompute == "none" else layout.recompute
    changed = dataclasses.replace(layout, recompute=policy)
    return device_memory(dataclasses.replace(config, layout=changed))


def is_traced(config: Config) -> bool:
    """Whether the estimate of a layout needs a trace."""
    layout = config.layout
    keeps_all = layout.recompute == "none" and layout.zero < 3
    return config.mesh.pipe == 1 and (keeps_all or layout.dispatch == "reference")
