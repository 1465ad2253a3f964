"""Chunks of a saved step's leaves on disk, read and written one at a time.

Orbax saves and restores whole leaves, one of which may be larger than host memory. The files of a
step hold one zarr array for each leaf, whose chunks tensorstore reads and writes separately.
"""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

CHUNK_BYTES = 1 << 25  # of a chunk at most
_ROW_BYTES = 1 << 20  # layers or experts of at least this size get chunks of their own
_AT_ONCE = 4  # chunks that are decoded or written at once
_LOOK = 1 << 20  # elements that `finite` looks at together
_KEPT_BYTES = 1 << 26  # of decoded chunks that are kept: the next part may lie in the same ones
_CODEC = {"driver": "zarr3", "codecs": [{"name": "zstd", "configuration": {"level": 3}}]}

Index = tuple[slice, ...]


def axes_to_cut(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...] | None:
    """Axes of a device's part of a leaf along which chunks have length 1.

    Args:
      shape: shape of the device's part.

    Returns:
      None where the whole part makes one chunk.
    """
    rows = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
    if math.prod(shape) * dtype.itemsize <= CHUNK_BYTES:
        return None
    return tuple(axis for axis, row in enumerate(rows) if row >= _ROW_BYTES)


def write(state: Path, name: str, like: Any, part_of: Callable[[Index], np.ndarray]) -> int:
    """Writes a leaf chunk by chunk, replacing the array that its name had before.

    Args:
      state: the folder `state` of a step's directory.
      like: an object with the leaf's shape and dtype.
      part_of: gives the values of a part; a few parts are in memory at once.

    Returns:
      The sum of bits of the whole leaf, as `bits` defines it.
    """
    steps = _chunk_shape(like.shape, like.dtype)
    # Zeros are written too, because orbax takes a chunk that is absent for a lost one.
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
    """Sum of the elements' bits, read as unsigned integers, modulo 2**32."""
    return int(part.view(f"u{part.itemsize}").sum(dtype=np.uint32))


def finite(part: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; looks at some at a time to bound memory."""
    if not jax.dtypes.issubdtype(part.dtype, np.inexact):
        return True
    flat = part.reshape(-1)
    some = (flat[start : start + _LOOK] for start in range(0, flat.size, _LOOK))
    return all(bool(np.isfinite(each).all()) for each in some)


class Leaves:
    """Leaves of a step by name; a read that fails raises tensorstore's own error."""

    def __init__(self, state: Path):
        """Opens no file yet; `state` is the folder of that name in a step's directory."""
        self._state = state
        self._shared = _context(_KEPT_BYTES)
        self._open = functools.cache(self._opened)

    def read(self, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        """The part `index` of a leaf, an index as NumPy takes it."""
        return self._open(name)[(*index, ...)].read().result()

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Values of a whole leaf, chunk by chunk; the next chunk is read in the background."""
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
        # The shared cache cannot keep a chunk of this size: each part would decode it again.
        return tensorstore.open(spec, read=True, context=_context(2 * chunk)).result()


def _kvstore(state: Path, name: str) -> dict[str, str]:
    return {"driver": "ocdbt", "base": f"file://{state}/", "path": f"{name}/"}


def _grid(shape: tuple[int, ...], steps: tuple[int, ...]) -> Iterator[Index]:
    """Indices of the chunks of an array; `steps` is the shape of a chunk."""
    starts = (range(0, size, step) for size, step in zip(shape, steps, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + step, size))
            for start, step, size in zip(corner, steps, shape, strict=True)
        )


def _chunk_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """Shape of a chunk: length 1 along `axes_to_cut`, the longest axis halved until it fits."""
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
