"""Parts of a saved step's leaves: how leaves are cut up on disk, and read a part at a time.

Orbax restores whole leaves, one of which may be larger than host memory. A step's files hold one
zarr array for each leaf, whose chunks tensorstore can read on their own.
"""

import functools
import itertools
import math
from collections.abc import Iterator
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


def axes_to_cut(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...] | None:
    """Axes of what a device holds of a leaf along which every row is a chunk of its own, or less.

    Returns:
      None where all of it makes one chunk.
    """
    rows = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
    if math.prod(shape) * dtype.itemsize <= CHUNK_BYTES:
        return None
    return tuple(axis for axis, row in enumerate(rows) if row >= _ROW_BYTES)


class Leaves:
    """The leaves of one step by name; any error of a read is what tensorstore raises."""

    def __init__(self, state: Path):
        """`state` is the folder of that name in a step's directory."""
        self._base = f"file://{state}/"
        self._shared = _context(_KEPT_BYTES)
        self._open = functools.cache(self._opened)

    def read(self, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        """The part of a leaf that `index`, as NumPy takes it, is."""
        return self._open(name)[(*index, ...)].read().result()

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """All of a leaf, each chunk of its file once; the next is on its way meanwhile."""
        array = self._open(name)
        steps = _chunk(array)
        corners = itertools.product(
            *(range(0, size, step) for size, step in zip(array.shape, steps, strict=True))
        )
        coming = None
        for corner in corners:
            ends = (min(a + b, c) for a, b, c in zip(corner, steps, array.shape, strict=True))
            index = tuple(itertools.starmap(slice, zip(corner, ends, strict=True)))
            coming, ready = array[(*index, ...)].read(), coming
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()

    def _opened(self, name: str) -> Any:
        store = {"driver": "ocdbt", "base": self._base, "path": f"{name}/"}
        spec = {"driver": "zarr3", "kvstore": store}
        array = tensorstore.open(spec, read=True, context=self._shared).result()
        chunk = math.prod(_chunk(array)) * array.dtype.numpy_dtype.itemsize
        if 2 * chunk <= _KEPT_BYTES:
            return array
        # Without a place to be kept it would be decoded again for each of its parts.
        return tensorstore.open(spec, read=True, context=_context(2 * chunk)).result()


def _chunk(array: Any) -> tuple[int, ...]:
    return array.chunk_layout.read_chunk.shape or ()  # None for a scalar


def _context(kept: int) -> Any:
    return tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": kept},
            "data_copy_concurrency": {"limit": _AT_ONCE},
        }
    )
