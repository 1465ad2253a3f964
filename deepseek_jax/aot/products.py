"""Matrix products of a compiled program by the type of their operands, and its Hopper kernels.

A kernel for Hopper multiplies arrays of E4M3, and its name is in the text. In the portable form of
FP8 a product multiplies BF16 arrays, and FP8 is where these come from: each operand is an array of
E4M3 times its scales. This module follows the operands of each product back to the array that they
were made of. A product of a linear layer in BF16 is thus told from one in FP8, although both run
the same library call.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping

from deepseek_jax.aot import compiled
from deepseek_jax.aot.compiled import Gemm, Kernels
from deepseek_jax.aot.hlo import FP8, Instruction, Module
from deepseek_jax.kernels import kernel_names
from deepseek_jax.precision.scopes import PRODUCTS

MOSAIC = "mosaic_gpu_v2"  # target of a custom call
OTHER = "other"  # products outside the scopes of `PRODUCTS`, and kernels of other names
_FLOATS = ("bf16", "f16", "f32", FP8)
# Instructions whose result holds numbers of their first operand, in other places or another type.
_MOVES = {
    "bitcast", "convert", "copy", "copy-start", "copy-done", "dynamic-slice", "pad", "reshape",
    "slice", "transpose", "gather",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two matrices, or of groups of them.

    Attributes:
      gemm: the product; `gemm.op_name` is its place in the Python program.
      kind: its scope, one of `PRODUCTS`, or OTHER.
      in_fp8: whether both operands are E4M3 values times scales.
      kernel: name of the Hopper kernel that computes it; empty for all others.
    """

    gemm: Gemm
    kind: str
    in_fp8: bool
    kernel: str


def counts(module: Module, kernels: Kernels | None = None) -> Mapping[tuple[str, bool], int]:
    """Number of products in the text by (kind, in_fp8); a loop's body counts once."""
    return collections.Counter((each.kind, each.in_fp8) for each in products(module, kernels))


def kernel_counts(module: Module) -> Mapping[str, int]:
    """Number of the Hopper kernels in the text by name; a loop's body counts once."""
    lines = (line for each in module.computations.values() for line in each.values())
    return collections.Counter(_kernel(line) for line in lines if line.target == MOSAIC)


def fp8_casts(module: Module) -> Iterator[str]:
    """Yields the place in the Python program of each cast to FP8 that is outside the kernels."""
    for lines in module.computations.values():
        for line in lines.values():
            if line.opcode == "convert" and line.arrays[0].dtype == FP8:
                yield line.op_name


def _kernel(line: Instruction) -> str:
    parts = line.op_name.split("/")
    return next((part for part in reversed(parts) if part in kernel_names.ALL), OTHER)


def products(module: Module, kernels: Kernels | None = None) -> Iterator[Product]:
    """Yields each product of a module once, whatever the number of its runs.

    Args:
      module: parsed text of a compiled program.
      kernels: Pallas kernels that are products, as in `compiled.read`.
    """
    trace = _Trace(module)
    for computation, lines in module.computations.items():
        for line in lines.values():
            gemm = compiled.gemm(line, module.inputs(computation, line), kernels or {})
            if gemm is None:
                continue
            parts = gemm.op_name.split("/")
            kind = next((scope for scope in PRODUCTS if _inside(scope, parts)), OTHER)
            kernel = _kernel(line) if line.target == MOSAIC else ""
            matrices = [name for name in line.operands if _is_matrix(lines[name], bool(kernel))]
            both = matrices[:2]
            in_fp8 = len(both) == 2 and all(trace.from_fp8(computation, m) for m in both)
            yield Product(gemm, kind, in_fp8, kernel)


def _inside(scope: str, parts: list[str]) -> bool:
    """Whether the path has the scope, which a transformation may stand around: jvp(scope)."""
    return any(part.rstrip(")").rpartition("(")[2] == scope for part in parts)


def _is_matrix(line: Instruction, beside_scales: bool) -> bool:
    """Whether the result may be an operand of a product; of one beside scales, in float32, FP8."""
    types = (FP8,) if beside_scales else _FLOATS
    return any(len(array.shape) > 1 and array.dtype in types for array in line.arrays)


class _Trace:
    """Origins of the arrays of a module."""

    def __init__(self, module: Module):
        self._module = module
        self._callers = {
            called: (computation, line)
            for computation, lines in module.computations.items()
            for line in lines.values()
            for called in line.calls
        }

    def from_fp8(
        self, computation: str, name: str, index: int = 0, multiplied: bool = False
    ) -> bool:
        """Whether element `index` of a result is an E4M3 array, times scales unless `multiplied`.

        Values that took part in any other computation are not.
        """
        lines = self._module.computations[computation]
        line = lines[name]
        if len(line.arrays) > index and line.arrays[index].dtype == FP8:
            return True
        if line.opcode in _MOVES:
            return self.from_fp8(computation, line.operands[0], 0, multiplied)
        if line.opcode == "opt-barrier":
            return self.from_fp8(computation, line.operands[0], index, multiplied)
        if line.opcode == "get-tuple-element":
            return self.from_fp8(computation, line.operands[0], line.index, multiplied)
        if line.opcode == "tuple":
            return self.from_fp8(computation, line.operands[index], 0, multiplied)
        if line.opcode == "multiply" and not multiplied:
            return any(self.from_fp8(computation, each, 0, True) for each in line.operands)
        if line.opcode == "select":
            return any(self.from_fp8(computation, each, 0, multiplied) for each in line.operands)
        if line.opcode in ("fusion", "call", "conditional"):
            roots = (self._root(called) for called in line.calls)
            return all(self.from_fp8(*root, index, multiplied) for root in roots)
        if line.opcode == "while":  # only what no trip changes keeps its origin
            root = self._root(line.body)
            return self.from_fp8(*root, index, multiplied)
        if line.opcode == "parameter" and computation in self._callers:
            outer, caller = self._callers[computation]
            given = caller.operands[self._operand(caller, computation, line.index)]
            return self.from_fp8(outer, given, index, multiplied)
        return False

    def _root(self, computation: str) -> tuple[str, str]:
        lines = self._module.computations[computation].values()
        return computation, next(line.name for line in lines if line.root)

    @staticmethod
    def _operand(caller: Instruction, computation: str, parameter: int) -> int:
        """Number of the caller's operand that is the parameter of a computation it calls."""
        if caller.opcode == "conditional":
            return 1 + caller.calls.index(computation)
        return parameter
