"""Sources of FP8 tiles: the arrays that a quantiser for Hopper reads, and x as their function.

M rows, D columns of x, which is bfloat16. XLA would write x, and read it again to quantise it; a
quantiser makes x of its source on the way, number by number.

    Plain             x itself
    FromSwiGLU        gate and up: x = silu(gate) up scale, the output of SwiGLU
    FromNorm          x is the output of RMSNorm, given 1 / rms of each row
    FromKept          tiles of x along its columns, which backward has
    FromKeptSwiGLU    such tiles of gate and up

1 / rms takes a reading of its own: a row is longer than the squares that quantisers read.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.fp8_quantise import Operand, PerColumn, PerRow, Square
from deepseek_jax.precision.fp8_tiles import BLOCK, Tiles, dequantise_tiles
from deepseek_jax.precision.rounding import rounded

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


def _swiglu(gate: jax.Array, up: jax.Array, scale: jax.Array) -> jax.Array:
    """silu(gate) up scale, in the order of `precision/swiglu.py`."""
    return jax.nn.silu(gate) * up * scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FromSwiGLU:
    """SwiGLU of gate and up.

    Attributes:
      gate_up: M(2D) bfloat16, gate first.
      scale: M float32.
    """

    gate_up: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        return self.gate_up.shape[0], self.gate_up.shape[1] // 2

    @property
    def fits(self) -> bool:
        return self.gate_up.dtype == BFLOAT16

    def portable(self) -> jax.Array:
        gate, up = jnp.split(self.gate_up.astype(jnp.float32), 2, axis=1)
        return rounded(_swiglu(gate, up, self.scale[:, None]), BFLOAT16)

    def operands(self) -> tuple[list[Operand], Callable[..., jax.Array] | None]:
        gate_up, columns = self.gate_up, self.shape[1]
        if columns % BLOCK:
            halves = gate_up.reshape(-1, 2, columns)
            gate_up = padded(halves, 2).reshape(gate_up.shape[0], -1)
        gate_up, scale = padded(gate_up, 0), padded(self.scale[None], 1)
        return [Square(gate_up), Square(gate_up, gate_up.shape[1] // 2), PerRow(scale)], _swiglu


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FromNorm:
    """RMSNorm of x.

    Attributes:
      x: MD bfloat16.
      inverse_rms: M float32, 1 / rms of each row.
      scale: D float32, the weight of the norm.
    """

    x: jax.Array
    inverse_rms: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, x: jax.Array, scale: jax.Array, eps: float) -> "FromNorm":
        """The output of `model/norm.py`, whose 1 / rms takes a reading of x, MD bfloat16."""
        wide = x.astype(jnp.float32)
        return cls(x, jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1) + eps), scale)

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.x.shape[1]

    @property
    def fits(self) -> bool:
        return self.x.dtype == BFLOAT16

    def portable(self) -> jax.Array:
        wide = self.x.astype(jnp.float32)
        return rounded(wide * self.inverse_rms[:, None] * self.scale[None], BFLOAT16)

    def operands(self) -> tuple[list[Operand], Callable[..., jax.Array] | None]:
        rms, scale = padded(self.inverse_rms[None], 1), padded(self.scale, 0)
        operands: list[Operand] = [Square(padded(self.x, 0, 1)), PerRow(rms), PerColumn(scale)]
        return operands, lambda x, inverse_rms, scale: x * inverse_rms * scale


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FromKeptSwiGLU:
    """SwiGLU of gate and up, of which there are tiles.

    Attributes:
      tiles: of M(2D), gate first, along columns, with power-of-two scales. The kernel takes them if
        128 divides D, so that no tile has columns of both.
      scale: M float32.
    """

    tiles: Tiles
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        return self.tiles.values.shape[0], self.tiles.values.shape[1] // 2

    @property
    def fits(self) -> bool:
        return self.shape[1] % BLOCK == 0

    def portable(self) -> jax.Array:
        return FromSwiGLU(dequantise_tiles(self.tiles, BFLOAT16), self.scale).portable()

    def operands(self) -> tuple[list[Operand], Callable[..., jax.Array] | None]:
        values, left = padded(self.tiles.values, 0), self.shape[1]
        scales = padded(self.tiles.scales, 0).mT
        operands: list[Operand] = [Square(values), PerRow(scales)]
        operands += [Square(values, left), PerRow(scales, left)]
        operands += [PerRow(padded(self.scale[None], 1))]

        # An E4M3 value times a power of two is exact in bfloat16, so nothing is rounded twice.
        def make(*numbers: jax.Array) -> jax.Array:
            gate, gate_scale, up, up_scale, scale = numbers
            return _swiglu(gate * gate_scale, up * up_scale, scale)

        return operands, make


def padded(x: jax.Array, *axes: int) -> jax.Array:
    """x with zeros at the end of these axes, up to multiples of 128."""
    padding = [(0, 0)] * x.ndim
    for axis in axes:
        padding[axis] = (0, -x.shape[axis] % BLOCK)
    return jnp.pad(x, padding)
