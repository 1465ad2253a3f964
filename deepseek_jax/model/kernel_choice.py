"""The GPU kernels that a run computes with, by `precision.kernels`; all else is portable.

With "auto" a process on a GPU checks each kernel that its recipe knows, once. A CPU checks nothing:
programs that are lowered there for a virtual cluster hold every kernel, and those for the CPU none,
since a kernel is chosen by the platform that a program is lowered for.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax

from deepseek_jax.precision import fp8_checks
from deepseek_jax.precision.recipes import Recipe
from deepseek_jax.runtime import kernel_check, processes

PORTABLE = "portable"  # the value of `precision.kernels`, and what a summary then says
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """Kernels of a recipe.

    Attributes:
      names: of those that compute in programs for CUDA.
      refused: reason for each that failed its check here.
    """

    names: frozenset[str]
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Fields of `summary.json`: the kernels that this process computes with."""
        here = self.names if jax.default_backend() == "gpu" else ()
        found: dict[str, Any] = {"kernels": ", ".join(sorted(here)) or PORTABLE}
        return found | ({"kernels_refused": dict(self.refused)} if self.refused else {})


def of(recipe: Recipe, setting: str) -> KernelChoice:
    """The choice for a recipe; all processes have to call this in the same order.

    Args:
      setting: `precision.kernels`.
    """
    known = recipe.known_kernels
    if setting == PORTABLE:
        return KernelChoice(frozenset())
    if not known or jax.default_backend() != "gpu":
        return KernelChoice(known)
    refused = _refused(known)
    return KernelChoice(known - refused.keys(), refused)


@functools.cache
def _refused(names: frozenset[str]) -> Mapping[str, str]:
    """Reasons by name of the kernels that fail on this process's GPU; says each once."""
    checks = {name: check for name, check in fp8_checks.checks().items() if name in names}
    found = kernel_check.refused(checks, jax.local_devices()[0])
    if processes.is_primary():
        for name, reason in found.items():
            _log.warning("the kernel %s is not used (%s); its portable form is", name, reason)
    return found
