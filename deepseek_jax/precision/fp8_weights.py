"""FP8 weights: 128x128 values in E4M3 under one scale, made once per step (section 3.3.2).

Weights of a published FP8 checkpoint are such blocks already: `of_part` takes them as they are.

The blocks are those of the matrix [in, out] that a linear layer multiplies with, as published FP8
checkpoints have them: a weight HWD of heads and their widths is the matrix (HW)D. One block has one
scale on every layout. A device that holds a part of a weight therefore takes the largest magnitude
of a block over all devices that share it, in a message of one number per block.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from deepseek_jax.precision import fp8_tiles
from deepseek_jax.precision.fp8_tiles import BLOCK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """A weight values * scales, in place of an array.

    Attributes:
      values: float8_e4m3fn, in the shape of the weight; a stack of layers in front.
      scales: float32. Dimensions that belong to the input, or to the output, of one matrix are
        joined; the others, as experts, are kept. Along a joined dimension of size n there are
        ceil(n / 128) scales; or n, where the edge of a device's part cuts a block.
      carrier: float32 in the shape of the weight, or None. Its numbers are never read. A float8
        array cannot have a float32 gradient; the weight's gradient is that of the carrier.
    """

    values: jax.Array
    scales: jax.Array
    carrier: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def ndim(self) -> int:
        """Dimensions of the weight."""
        return self.values.ndim

    def __getitem__(self, key: Any) -> "Fp8Weight":
        """The weight itself for `...`, as of an array."""
        if key is not Ellipsis:
            raise TypeError("an FP8 weight has no parts but the arrays in it")
        return self

    def reshape(self, *shape: int) -> "Fp8Weight":
        """The weight with its last two dimensions joined; no other shape is possible."""
        joined = (*self.shape[:-2], math.prod(self.shape[-2:]))
        if tuple(shape) not in (joined, (*joined[:-1], -1)):
            raise ValueError(f"an FP8 weight {self.shape} has no shape {shape}")
        scales = self.scales
        if self.shape[-1] % BLOCK:  # blocks end inside the joined dimension
            scales = fp8_tiles.spread(scales, (*scales.shape[:-1], self.shape[-1]))
        carrier = None if self.carrier is None else self.carrier.reshape(joined)
        return Fp8Weight(
            self.values.reshape(joined), scales.reshape(*scales.shape[:-2], -1), carrier
        )

    def dequantised(self, rows: int, dtype: DTypeLike) -> jax.Array:
        """The matrices of the weight, ...(rows)(columns), in `dtype`."""
        experts = self.scales.shape[:-2]
        values = self.values.reshape(*experts, rows, -1).astype(jnp.float32)
        return (values * fp8_tiles.spread(self.scales, values.shape)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Dimensions of a linear layer's weight, and the part of it that a device holds.

    Attributes:
      roles: a letter for each dimension: "i" if it belongs to the input of the matrix, "o" if to
        its output, "-" if it counts matrices, such as experts. Of the inputs, and of the outputs,
        all are neighbours.
      sizes: of the whole weight.
      starts: index of the first element that this device holds, along each dimension.
      used_starts, used_sizes: the part that a step on this device computes with, after the parts
        of ZeRO are gathered.
      over: mesh axes whose devices hold other parts of the same matrices.
    """

    roles: str
    sizes: tuple[int, ...]
    starts: tuple[Any, ...]
    used_starts: tuple[Any, ...]
    used_sizes: tuple[int, ...]
    over: tuple[str, ...] = ()

    @classmethod
    def whole(cls, roles: str, sizes: tuple[int, ...]) -> "Linear":
        """A weight that this device holds alone."""
        nothing = (0,) * len(sizes)
        return cls(roles, sizes, nothing, nothing, sizes)


def bare(weight: Fp8Weight) -> Fp8Weight:
    """The weight without its carrier."""
    return dataclasses.replace(weight, carrier=None)


def quantise_blocks(weight: jax.Array, linear: Linear, *, power_of_two: bool) -> Fp8Weight:
    """FP8 form of a float32 weight, or of this device's part of it.

    A NaN or an infinity makes its whole block NaN. See `fp8_tiles.quantise_tiles`
    for the error of each value, and for `power_of_two`.

    Args:
      weight: any float dtype, in the shape of the part; a stack of layers in front.
    """
    dims = len(linear.sizes)
    layers, part = weight.shape[: weight.ndim - dims], weight.shape[weight.ndim - dims :]
    mine = _axes(linear, linear.starts, part)
    used = _axes(linear, linear.used_starts, linear.used_sizes)
    x = weight.astype(jnp.float32).reshape(*layers, *(axis.size for axis in mine))
    numbered = list(enumerate(mine, len(layers)))
    largest = jnp.abs(x)
    for number, axis in numbered:
        largest = axis.largest(largest, number)
    if linear.over:
        bits = lax.pmax(fp8_tiles.as_integers(largest), linear.over)
        largest = fp8_tiles.as_floats(bits)
    table = fp8_tiles.scales_of(largest, power_of_two)
    own, kept = table, table
    for (number, axis), other in zip(numbered, used, strict=True):
        own, kept = axis.scales(own, number), other.scales(kept, number)
    values = fp8_tiles.quantised(x, fp8_tiles.spread(own, x.shape), power_of_two)
    return Fp8Weight(values.reshape(weight.shape), kept)


def of_part(weight: Fp8Weight, linear: Linear) -> Fp8Weight:
    """The FP8 form of this device's part of a weight that is stored in FP8; no value changes.

    Args:
      weight: values of the part, and the scales of whole matrices, `scales_shape`; a stack of
        layers in front of both.
    """
    scales, layers = weight.scales, weight.ndim - len(linear.sizes)
    used = _axes(linear, linear.used_starts, linear.used_sizes)
    for number, axis in enumerate(used, layers):
        scales = axis.scales(scales, number)
    return dataclasses.replace(weight, scales=scales)


def scales_shape(roles: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a whole weight with these roles and sizes, without layers."""
    shape: list[int] = []
    for role, group in itertools.groupby(zip(roles, sizes, strict=True), lambda dim: dim[0]):
        counts = [size for _, size in group]
        shape += counts if role == "-" else [-(-math.prod(counts) // BLOCK)]
    return tuple(shape)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A dimension of the matrices, or one that counts them, and a device's part of it.

    Attributes:
      size: elements of the part.
      blocks: blocks of the whole dimension; None where every element is a matrix of its own.
      first: block in which the part begins, if it begins and ends with a block.
      block: block of each element, if the part cuts one.
    """

    size: int
    blocks: int | None = None
    first: Any = 0
    block: jax.Array | None = None

    def largest(self, x: jax.Array, axis: int) -> jax.Array:
        """Largest value of each block of the whole dimension; 0 for blocks that are not here."""
        if self.blocks is None:
            return x
        if self.block is not None:
            bits = jnp.moveaxis(fp8_tiles.as_integers(x), axis, 0)
            bits = jax.ops.segment_max(bits, self.block, self.blocks)
            return jnp.moveaxis(fp8_tiles.as_floats(jnp.maximum(bits, 0)), 0, axis)
        here = fp8_tiles.largest_of_tiles(x, axis)
        if here.shape[axis] == self.blocks:
            return here
        shape = (*x.shape[:axis], self.blocks, *x.shape[axis + 1 :])
        return lax.dynamic_update_slice_in_dim(
            jnp.zeros(shape, x.dtype), here, jnp.asarray(self.first, jnp.int32), axis
        )

    def scales(self, table: jax.Array, axis: int) -> jax.Array:
        """Scales of the part, of those of the whole dimension."""
        if self.blocks is None:
            return table
        if self.block is not None:
            return jnp.take(table, self.block, axis)
        count = -(-self.size // BLOCK)
        if count == self.blocks:
            return table
        return lax.dynamic_slice_in_dim(table, jnp.asarray(self.first, jnp.int32), count, axis)


def _axes(linear: Linear, starts: tuple[Any, ...], part: tuple[int, ...]) -> list[_Axis]:
    """The dimensions of a part, neighbours of one role joined."""
    axes = []
    for role, group in itertools.groupby(range(len(part)), linear.roles.__getitem__):
        dims = list(group)
        if role == "-":
            axes += [_Axis(part[dim]) for dim in dims]
        else:
            axes.append(_joined(*(tuple(x[d] for d in dims) for x in (linear.sizes, starts, part))))
    return axes


def _joined(sizes: tuple[int, ...], starts: tuple[Any, ...], part: tuple[int, ...]) -> _Axis:
    """Dimension of blocks, from those that are its digits, the most significant first."""
    size, blocks = math.prod(part), -(-math.prod(sizes) // BLOCK)
    inner = math.prod(sizes[1:])
    if part == sizes:
        return _Axis(size, blocks)
    if part[1:] == sizes[1:] and size % BLOCK == 0:  # an equal share, so it begins with a block
        return _Axis(size, blocks, starts[0] * inner // BLOCK)
    place = jnp.zeros((1,), jnp.int32)
    for whole, start, count in zip(sizes, starts, part, strict=True):
        digit = start + jnp.arange(count, dtype=jnp.int32)
        place = (place[:, None] * whole + digit[None]).reshape(-1)
    return _Axis(size, blocks, block=place // BLOCK)
