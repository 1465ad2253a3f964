"""Check of GPU kernels at the start of a run: each computes a small problem of known result.

The sums of a problem are exact in any order, so a kernel has to agree to the bit with the portable
form of the same computation. A kernel that differs, fails to compile, or does not fit the GPU is
refused, in all processes alike: they run one program.
"""

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from deepseek_jax.errors import RunError
from deepseek_jax.runtime import agreement

SECONDS = 300  # far more than a check compiles and runs in
_LONGEST = 300  # characters of an error that is shown


@dataclasses.dataclass(frozen=True)
class Check:
    """A problem for a kernel.

    Attributes:
      kernel, portable: make the arrays to compare, by the kernel and by the portable form.
      generation: major compute capability of the GPUs that the kernel is for; None for any.
    """

    kernel: Callable[[], Any]
    portable: Callable[[], Any]
    generation: int | None = None


def refused(
    checks: Mapping[str, Check],
    device: Any,
    agree: Callable[[str], str] = agreement.first_said,
    seconds: float | None = None,
) -> dict[str, str]:
    """Reasons by name of the kernels that may not run; all processes have to call this.

    Args:
      checks: by name of the kernel, the same names in every process.
      device: of this process; its `compute_capability` is read.
      agree: the first text that a process of the run has said, for all; "" if none has.
      seconds: time that each check has; None for `SECONDS`.

    Raises:
      RunError: a kernel has not come to an end. The GPU cannot be used any more.
    """
    limit = SECONDS if seconds is None else seconds
    reasons = {name: agree(_fault(name, checks[name], device, limit)) for name in sorted(checks)}
    return {name: reason for name, reason in reasons.items() if reason}


def _fault(name: str, check: Check, device: Any, seconds: float) -> str:
    """Reason why this process may not use a kernel; empty if it may."""
    found = str(getattr(device, "compute_capability", "none"))
    if check.generation is not None and found.partition(".")[0] != str(check.generation):
        return f"it needs compute capability {check.generation}.x, and this device has {found}"
    try:
        different, size = in_time(
            lambda: _differences(_arrays(check.kernel()), _arrays(check.portable())),
            seconds,
            f"the kernel {name} has not ended its check in {seconds:.0f} s; "
            "set precision.kernels=portable",
        )
    except RunError:
        raise
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST]
    return f"{different} of {size} numbers of its check are wrong" if different else ""


def _differences(got: list[np.ndarray], want: list[np.ndarray]) -> tuple[int, int]:
    """Numbers of `got` that are not those of `want`, and how many there are.

    Raises:
      ValueError: the arrays have other shapes.
    """
    shapes, wanted = ([array.shape for array in arrays] for arrays in (got, want))
    if shapes != wanted:
        raise ValueError(f"its check has arrays of {shapes}, and needs {wanted}")
    different = sum(int((a != b).sum()) for a, b in zip(got, want, strict=True))
    return different, sum(b.size for b in want)


def _arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def in_time(act: Callable[[], Any], seconds: float, otherwise: str) -> Any:
    """Result of `act`, called in a thread of its own: without the mesh that the caller has set.

    Raises:
      RunError: `otherwise`, where it has not ended in time.
    """
    found: list[Any] = []
    failed: list[Exception] = []

    def work() -> None:
        try:
            found.append(act())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True, name="kernel in time")
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise RunError(otherwise)
    return found[0]
