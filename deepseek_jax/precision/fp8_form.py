"""Form of each FP8 product: a kernel for Hopper, or the portable one.

A product is computed by its kernel where three things hold: the kernel's name is in use, the
program is lowered for CUDA, and the kernel takes the weight. Otherwise it is portable. A gradient
of a weight has no weight among its operands, so its kernel takes every shape.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax.precision.fp8_hopper import H100, HopperProducts
from deepseek_jax.precision.grouped import by_platform, mesh_is_of_cpus


@dataclasses.dataclass(frozen=True)
class Fp8Form:
    """Scales of FP8 products, and the kernels that may compute them.

    Attributes:
      power_of_two: whether scales are powers of two. The kernels take others, too.
      kernels: names in `kernels/kernel_names.py`.
      hopper: the kernels. With its `interpret` they run in a program for any platform.
    """

    power_of_two: bool = True
    kernels: frozenset[str] = frozenset()
    hopper: HopperProducts = H100

    def choose(
        self,
        name: str,
        portable: Callable[..., Any],
        kernel: Callable[..., Any],
        *,
        takes: bool = True,
    ) -> Callable[..., Any]:
        """The form of a computation: one of two functions of arrays, alike in results.

        Args:
          name: of the kernel.
          takes: whether the kernel takes these operands.
        """
        if not takes or not self.uses(name):
            return portable
        return kernel if self.hopper.interpret else by_platform(portable, kernel)

    def uses(self, name: str) -> bool:
        """Whether a kernel is in use here, on some platform that the program may be lowered for."""
        if name not in self.kernels or self.hopper.interpret:
            return name in self.kernels
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:  # the program is one of this process
            return jax.default_backend() != "cpu"
        # Outside `shard_map` XLA would gather the operands of a kernel.
        alone = mesh.size == 1 or set(mesh.axis_names) == set(mesh.manual_axes)
        return alone and not mesh_is_of_cpus()


PORTABLE = Fp8Form()  # no kernel
