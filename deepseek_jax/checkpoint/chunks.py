"""Parts of a saved step's leaves: how leaves are cut up on disk, and read or made part by part.

Orbax saves and restores whole leaves, one of which may be larger than host memory. A step's files
hold one zarr array for each leaf, whose chunks tensorstore reads and writes on their own.
"""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

# A chunk is no larger than the first of these; the layers and experts of a stack are each cut off
# on the way there if one has at least the second.
CHUNK_BYTES, _ROW_BYTES = 1 << 25, 1 << 20
# Chunks that are decoded at once, and kept because the next part may lie in the same ones.
_AT_ONCE = 4
_KEPT_BYTES = 1 << 26
_CODEC = {"driver": "zarr3", "codecs": [{"name": "zstd", "configuration": {"level": 3}}]}

Index = tuple[slice, ...]


def axes_to_cut(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...] | None:
    """Axes of what a device holds of a leaf along which every row is a chunk of its own, or less.

    Returns:
      None where all of it makes one chunk.
    """
    rows = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
    if math.prod(shape) * dtype.itemsize <= CHUNK_BYTES:
        return None
    return tuple(axis for axis, row in enumerate(rows) if row >= _ROW_BYTES)


def write(state: Path, name: str, like: Any, part_of: Callable[[Index], np.ndarray]) -> int:
    """Writes a leaf chunk by chunk, in place of what is there under its name.

    Args:
      state: the folder of that name in a step's directory.
      like: what has the leaf's shape and dtype.
      part_of: the values of a part, of which a few are in memory at once.

    Returns:
      The sum of its elements' bits, as `bits` gives for all of it.
    """
    steps = _chunk_shape(like.shape, like.dtype)
    # Zeros are written too: orbax takes a chunk that is not there for one that was lost.
    array = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": _kvstore(state, name),
            "store_data_equal_to_fill_value": True,
        },
        create=True,
        delete_existing=True,
        shape=like.shape,
        dtype=tensorstore.dtype(like.dtype),
        chunk_layout=tensorstore.ChunkLayout(chunk_shape=steps),
        codec=tensorstore.CodecSpec(_CODEC),
    ).result()
    total = 0
    writing: collections.deque[Any] = collections.deque()
    for index in _grid(like.shape, steps):
        part = part_of(index)
        total += bits(part)
        writing.append(array[index].write(part))
        if len(writing) == _AT_ONCE:
            writing.popleft().result()
    for last in writing:
        last.result()
    return total % 2**32


def bits(part: np.ndarray) -> int:
    """Sum of the elements' bits modulo 2**32."""
    return int(part.view(f"u{part.itemsize}").sum(dtype=np.uint32))


class Leaves:
    """The leaves of one step by name; any error of a read is what tensorstore raises."""

    def __init__(self, state: Path):
        """`state` is the folder of that name in a step's directory."""
        self._state = state
        self._shared = _context(_KEPT_BYTES)
        self._open = functools.cache(self._opened)

    def read(self, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        """The part of a leaf that `index`, as NumPy takes it, is."""
        return self._open(name)[(*index, ...)].read().result()

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """All of a leaf, each chunk of its file once; the next is on its way meanwhile."""
        array = self._open(name)
        coming = None
        for index in _grid(array.shape, _chunk(array)):
            coming, ready = array[index].read(), coming
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()

    def _opened(self, name: str) -> Any:
        spec = {"driver": "zarr3", "kvstore": _kvstore(self._state, name)}
        array = tensorstore.open(spec, read=True, context=self._shared).result()
        chunk = math.prod(_chunk(array)) * array.dtype.numpy_dtype.itemsize
        if 2 * chunk <= _KEPT_BYTES:
            return array
        # Without a place to be kept it would be decoded again for each of its parts.
        return tensorstore.open(spec, read=True, context=_context(2 * chunk)).result()


def _kvstore(state: Path, name: str) -> dict[str, str]:
    return {"driver": "ocdbt", "base": f"file://{state}/", "path": f"{name}/"}


def _grid(shape: tuple[int, ...], steps: tuple[int, ...]) -> Iterator[Index]:
    """The parts that chunks of a shape make of an array."""
    starts = (range(0, size, step) for size, step in zip(shape, steps, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + step, size))
            for start, step, size in zip(corner, steps, shape, strict=True)
        )


def _chunk_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """Chunks as orbax is asked for them: rows of the axes to cut, and halves until they fit."""
    cut = axes_to_cut(shape, dtype) or ()
    steps = [1 if axis in cut else size for axis, size in enumerate(shape)]
    while math.prod(steps) * dtype.itemsize > CHUNK_BYTES:
        longest = steps.index(max(steps))
        steps[longest] = -(-steps[longest] // 2)
    return tuple(steps)


def _chunk(array: Any) -> tuple[int, ...]:
    return array.chunk_layout.read_chunk.shape or ()  # None for a scalar


def _context(kept: int) -> Any:
    return tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": kept},
            "data_copy_concurrency": {"limit": _AT_ONCE},
        }
    )
