"""Sources of FP8 tiles: the arrays that a quantiser for Hopper reads, and x as their function.

M rows, D columns of x, which is bfloat16. XLA would write x, and read it again to quantise it; a
quantiser makes x of its source on the way, number by number.

    Plain         x itself
    FromSwiGLU    gate and up: x = silu(gate) up scale, the output of SwiGLU
    FromKept      tiles of x along its columns, of a message or of a residual

`source_of` finds the source of a linear layer's input. Two more were written, and did not pay: the
output of RMSNorm, whose 1 / rms takes a reading of its own, and SwiGLU of kept tiles of gate and
up, in backward, where XLA computes SwiGLU anyway for the gradients (docs/kernels.md has figures).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.fp8_quantise import Operand, PerRow, Square
from deepseek_jax.precision.fp8_tiles import BLOCK, Tiles, dequantise_tiles
from deepseek_jax.precision.linear_input import LinearInput, SwiGLU, TiledArray, numbers
from deepseek_jax.precision.rounding import rounded
from deepseek_jax.precision.swiglu import swiglu

BFLOAT16 = jnp.dtype(jnp.bfloat16)


class TileSource(Protocol):
    """Arrays that x, MD bfloat16, is made of."""

    @property
    def shape(self) -> tuple[int, int]:
        """M and D."""

    @property
    def fits(self) -> bool:
        """Whether the kernel reads these arrays."""

    def portable(self) -> jax.Array:
        """The numbers x, MD bfloat16."""

    def operands(self) -> tuple[list[Operand], Callable[..., jax.Array] | None]:
        """Operands of the kernel, padded with zeros to multiples of 128, and x of their numbers."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plain:
    """The array x itself, MD bfloat16."""

    x: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.x.shape[1]

    @property
    def fits(self) -> bool:
        return self.x.dtype == BFLOAT16

    def portable(self) -> jax.Array:
        return self.x

    def operands(self) -> tuple[list[Operand], Callable[..., jax.Array] | None]:
        operands: list[Operand] = [Square(padded(self.x, 0, 1))]
        return operands, None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FromSwiGLU:
    """SwiGLU of gate and up.

    Attributes:
      gate_up: M(2D) bfloat16, gate first.
      scale: M float32; None for 1.
    """

    gate_up: jax.Array
    scale: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.gate_up.shape[0], self.gate_up.shape[1] // 2

    @property
    def fits(self) -> bool:
        return self.gate_up.dtype == BFLOAT16

    def portable(self) -> jax.Array:
        return rounded(swiglu(self.gate_up, self.scale), BFLOAT16)

    def operands(self) -> tuple[list[Operand], Callable[..., jax.Array] | None]:
        gate_up, columns = self.gate_up, self.shape[1]
        if columns % BLOCK:
            halves = gate_up.reshape(-1, 2, columns)
            gate_up = padded(halves, 2).reshape(gate_up.shape[0], -1)
        gate_up = padded(gate_up, 0)
        operands: list[Operand] = [Square(gate_up), Square(gate_up, gate_up.shape[1] // 2)]
        if self.scale is not None:
            operands.append(PerRow(padded(self.scale[None], 1)))

        def make(gate: jax.Array, up: jax.Array, *scale: jax.Array) -> jax.Array:
            return math.prod(scale, start=jax.nn.silu(gate) * up)  # in the order of `swiglu`

        return operands, make


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FromKept:
    """Tiles of x along its columns, MD, with power-of-two scales."""

    tiles: Tiles

    @property
    def shape(self) -> tuple[int, int]:
        return self.tiles.values.shape[0], self.tiles.values.shape[1]

    @property
    def fits(self) -> bool:
        return True

    def portable(self) -> jax.Array:
        return dequantise_tiles(self.tiles, BFLOAT16)

    def operands(self) -> tuple[list[Operand], Callable[..., jax.Array] | None]:
        values = padded(self.tiles.values, 0, 1)
        scales = padded(self.tiles.scales, 0).mT
        return [Square(values), PerRow(scales)], lambda x, scale: x * scale


Source = FromSwiGLU | FromKept  # of a linear layer's input, where there is more than its numbers


def source_of(x: LinearInput, depth: int, power_of_two: bool) -> Source | None:
    """Source of the rows M(depth) of a linear layer's input; None if it is its numbers.

    Args:
      x: M... of any leading dimensions, of which `depth` joins the last ones.
      power_of_two: whether the layer's scales are powers of two.
    """
    if not power_of_two:
        return None
    if isinstance(x, SwiGLU):
        if x.limit:  # the kernel computes no clamp: it quantises the numbers of XLA
            return None
        scale = None if x.scale is None else x.scale.reshape(-1)
        source = FromSwiGLU(numbers(x.gate_up).reshape(-1, 2 * depth), scale)
        return source if source.fits else None
    if not isinstance(x, TiledArray):
        return None
    values, rows = x.tiles.values, x.array.size // depth
    if values.shape[-1] != depth and values.shape[-1] % BLOCK:
        return None  # tiles end inside the joined dimension
    return FromKept(Tiles(values.reshape(rows, depth), x.tiles.scales.reshape(rows, -1)))


def padded(x: jax.Array, *axes: int) -> jax.Array:
    """x with zeros at the end of these axes, up to multiples of 128."""
    padding = [(0, 0)] * x.ndim
    for axis in axes:
        padding[axis] = (0, -x.shape[axis] % BLOCK)
    return jnp.pad(x, padding)
