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
    reasons = {name: _fault(name) for name in sorted(known)}
    refused = {name: reason for name, reason in reasons.items() if reason}
    return KernelChoice(known - refused.keys(), refused)


@functools.cache
def _fault(name: str) -> str:
    """Reason why a kernel may not run in this process, said once; empty if it may."""
    check = {name: fp8_checks.checks()[name]}
    reason = kernel_check.refused(check, jax.local_devices()[0]).get(name, "")
    if reason and processes.is_primary():
        _log.warning("the kernel %s is not used (%s); its portable form is", name, reason)
    return reason
