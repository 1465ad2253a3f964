"""Fills our parameters from published tensors, on the devices that hold their parts.

A part is read straight from the files: no tensor is held whole, and no process reads the parts of
another one's devices.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from deepseek_jax.checkpoint.hf import safetensors
from deepseek_jax.checkpoint.hf.names import Piece
from deepseek_jax.model import params

Slices = tuple[slice, ...]  # start and stop along each dimension

HOST = ("cpu",)  # platforms whose devices keep arrays in host memory
BF16 = safetensors.DTYPES["BF16"]


class TensorReader(Protocol):
    """Published tensors by name."""

    def read(self, name: str, index: Slices) -> np.ndarray:
        """Values of the part `index` of a tensor; a view of the file where it can be."""
        ...

    def release(self, name: str) -> None:
        """Gives back the memory that reading a tensor took."""
        ...


def placed(
    weight: params.Weight, where: Sharding, parts: Sequence[Piece], source: TensorReader
) -> jax.Array:
    """A sharded parameter; each local device's part is filled on that device."""
    copies: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    indices: Any = where.addressable_devices_indices_map(weight.shape)
    for device, index in indices.items():
        held = (one.indices(size)[:2] for one, size in zip(index, weight.shape, strict=True))
        copies.setdefault(tuple(held), []).append(device)
    arrays = []
    for spans, (device, *others) in copies.items():
        part = tuple(itertools.starmap(slice, spans))
        first = _on_device(device, weight, part, parts, source)
        arrays += [first, *(jax.device_put(first, other) for other in others)]
    return jax.make_array_from_single_device_arrays(weight.shape, where, arrays)


def _on_device(
    device: jax.Device,
    weight: params.Weight,
    held: Slices,
    parts: Sequence[Piece],
    source: TensorReader,
) -> jax.Array:
    """The part of a parameter that one device holds.

    A CPU device takes over host memory as it is; other devices get the part layer by layer.
    """
    dtype, shape = np.dtype(weight.dtype), tuple(span.stop - span.start for span in held)
    if device.platform in HOST or weight.axes[0] != "layer":
        whole = _aligned(shape, dtype)
        fill(whole, weight.shape, held, parts, source)
        return jax.device_put(whole, device, may_alias=True)
    stack = jax.device_put(jnp.zeros(shape, dtype, device=device), device)
    for number, layer in enumerate(range(held[0].start, held[0].stop)):
        row = np.empty((1, *shape[1:]), dtype)
        fill(row, weight.shape, (slice(layer, layer + 1), *held[1:]), parts, source)
        stack = jax.block_until_ready(_set_layer(stack, jax.device_put(row, device), number))
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, row: jax.Array, number: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stack, row, number, 0)


def fill(
    out: np.ndarray,
    shape: tuple[int, ...],
    held: Slices,
    parts: Sequence[Piece],
    source: TensorReader,
) -> None:
    """Fills `out`, the part `held` of a parameter of this shape, from published tensors."""
    if not parts:
        out[...] = 0  # a router bias where none is published
    for piece in parts:
        whole = piece.index + (slice(None),) * (len(held) - len(piece.index))
        numbers = [(n, span) for n, span in zip(whole, held, strict=True) if type(n) is int]
        if not all(span.start <= n < span.stop for n, span in numbers):
            continue
        here = tuple(
            n - span.start if type(n) is int else n for n, span in zip(whole, held, strict=True)
        )
        dims = [
            (size, span)
            for n, size, span in zip(whole, shape, held, strict=True)
            if type(n) is not int
        ]
        _copy(out[here], _part(piece, dims, source))
        source.release(piece.name)


def _part(piece: Piece, dims: Sequence[tuple[int, slice]], source: TensorReader) -> np.ndarray:
    """The wanted part of a published tensor, in the shape of our parameter.

    An axis of the published tensor is a run of consecutive dimensions of ours. The span of the
    run's first dimension is read; the spans of the other dimensions are cut out of the values.

    Args:
      dims: whole size and wanted span of each dimension of ours.
    """
    left, read, shape, kept = list(dims), [], [], []
    for size in reversed(piece.shape) if piece.transposed else piece.shape:
        run = [left.pop(0)]
        while math.prod(length for length, _ in run) < size:
            run.append(left.pop(0))
        first, inner = run[0][1], [length for length, _ in run[1:]]
        step = math.prod(inner)
        read.append(slice(first.start * step, first.stop * step))
        shape += [first.stop - first.start, *inner]
        kept += [slice(None), *(span for _, span in run[1:])]
    index = tuple(reversed(read)) if piece.transposed else tuple(read)
    order = piece.order
    if order is None:
        values = source.read(piece.name, index)
    else:  # rows in another order: all are read
        whole = slice(0, piece.shape[0])
        values = source.read(piece.name, (whole, *index[1:]))[order[index[0]]]
    values = values.T if piece.transposed else values
    return values.reshape(shape + [1] * len(left))[tuple(kept)]


def _copy(out: np.ndarray, values: np.ndarray) -> None:
    """out[...] = values, fast where one of the two is a transpose.

    NumPy copies values of foreign dtypes one by one, so BF16 is copied as integers. Rows of 2^n
    bytes would fall into the same cache lines, so a transpose goes by blocks through a buffer whose
    rows are `pad` values longer.
    """
    if values.dtype == BF16 and out.dtype == np.float32:
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if values.dtype == out.dtype:
        bits = f"u{out.itemsize}"
        values, out = values.view(bits), out.view(bits)
    if out.ndim != 2:
        out[...] = values
        return
    rows, columns, pad = 64, 512, 32
    spread_out = np.empty((columns, len(out) + pad), values.dtype)
    for column in range(0, out.shape[1], columns):
        to = out[:, column : column + columns]
        held = spread_out[: to.shape[1], : len(out)]
        held[...] = values[:, column : column + columns].T
        for row in range(0, len(out), rows):
            to[row : row + rows] = held[:, row : row + rows].T


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at an address that a CPU device takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
