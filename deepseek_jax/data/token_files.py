"""Token files: ids of an external tokenizer, memory-mapped in place.

A `.npy` file has one row of integers. A `.bin` file has bare little-endian ids: uint32 if the first
ids, read as uint32, are all below `model.vocab` (or 65,536), or every second uint16 is as small as
the upper half of an id; else uint16. The header of llm.c is
known: it tells width and number of the ids after it. Documents end at the end-of-text id; a stream
without that id is cut into pieces of about 4,096 tokens. If the first document begins with BOS, BOS
is expected before every document.
"""

import dataclasses
import hashlib
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import one_line
from deepseek_jax.data import formats, hashing
from deepseek_jax.data.files import HEAD, open_regular
from deepseek_jax.errors import RunError, reason

DOCUMENT_TOKENS = 4096  # size of pieces of a stream without end-of-text id
_CHUNK = 1 << 24  # ids
_SURE = 16  # ids that are enough to tell their dtype
_LLM_C = {20240520: 2, 20240801: 4}  # first number of a header of 256 int32 -> bytes of an id
_LLM_C_HEADER = 1024  # bytes


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """Concatenated token files, and the D documents in them.

    Attributes:
      spans: [D, 2] int64, start and stop of each document over all shards, without marks.
      has_bos: True if documents begin with BOS.
      largest: Largest id.
    """

    spans: np.ndarray
    has_bos: bool
    largest: int


class Shard:
    """Ids of one file, memory-mapped.

    Args:
      descriptor: The open file; it may be closed afterwards.
      name: Path of the file in messages.
      dtype: Dtype of an id.
      start: Byte where the ids begin.

    Attributes:
      ids: [N], read-only.
    """

    def __init__(self, descriptor: int, name: str, dtype: np.dtype, start: int = 0):
        self._name = name
        self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self._size = len(self._map)
        count = (self._size - start) // dtype.itemsize
        self.ids = np.frombuffer(self._map, dtype, count, start)

    def check(self) -> None:
        """Raises RunError if the file became shorter: a read past its end kills the process."""
        if self._map.size() < self._size:
            raise RunError(
                f"the token file {self._name} became shorter while it was in use; put it back, "
                "and the same command goes on from the last checkpoint"
            )


def open_shard(file: Path, vocab: int) -> tuple[Shard, str]:
    """Maps the ids of a token file into memory -> (ids, hash of them).

    Raises:
      ConfigError: A file that has no ids.
    """
    name = one_line(file)
    try:
        descriptor = open_regular(file)
    except OSError as error:
        raise ConfigError(
            f"data.path: {name} cannot be read: {reason(error)}; repair it, or set data.path to "
            "other files"
        ) from error
    try:
        size = os.fstat(descriptor).st_size
        dtype, start = _layout(descriptor, file, size, vocab)
        if size == start:
            raise ConfigError(f"data.path: {name} is empty; set data.path to files with tokens")
        content = f"{dtype.str} {hashing.of_file(descriptor, start)}"
        return Shard(descriptor, name, dtype, start), content
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"data.path: {name} cannot be read: {reason(error)}") from error
    finally:
        os.close(descriptor)


def _layout(descriptor: int, file: Path, size: int, vocab: int) -> tuple[np.dtype, int]:
    """Dtype of the ids of a token file, and the byte where they begin."""
    name, head = one_line(file), os.pread(descriptor, HEAD, 0)
    if head.startswith(formats.NPY):
        return _npy(descriptor, name, size)
    if file.suffix.lower() == ".npy" and head:
        raise ConfigError(
            f"data.path: {name} is not a NumPy array; it looks like {formats.looks_like(head)}"
        )
    if _is_half_of_megatron(file):
        raise ConfigError(
            f"data.path: {name} is half of a Megatron data set, with an index beside it; write its "
            "ids as .npy, each document with its end-of-text id"
        )
    last = os.pread(descriptor, 1, max(0, size - 1))
    is_pickle = head[:1] == b"\x80" and head[1:2] <= b"\5" and last == b"."
    if formats.foreign(head) or formats.is_parquet(head) or formats.is_surely_text(head):
        raise ConfigError(
            f"data.path: {name} holds no bare ids; it looks like {formats.looks_like(head)}"
        )
    if is_pickle:
        raise ConfigError(f"data.path: {name} holds no bare ids; it looks like a Python pickle")
    first = np.frombuffer(head[:12].ljust(12), "<i4")
    if first[0] in _LLM_C and 0 < first[1] < 100:
        width, count = _LLM_C[int(first[0])], int(first[2])
        if size != _LLM_C_HEADER + width * count:
            raise ConfigError(
                f"data.path: {name} is damaged: its header tells of {count:,} ids of {width} "
                f"bytes, and it has {size:,} bytes; write it again"
            )
        return np.dtype(f"<u{width}"), _LLM_C_HEADER
    if other := _other_dtype(head):
        raise ConfigError(
            f"data.path: {name} looks like ids of dtype {other}, and bare ids are little-endian "
            "uint16 or uint32; convert it to .npy"
        )
    width = _width(head, vocab)
    if size % width:
        raise ConfigError(
            f"data.path: {name} has {size} bytes, which is no whole number of uint16 or uint32 "
            "ids; convert it to .npy"
        )
    return np.dtype(f"<u{width}"), 0


def _npy(descriptor: int, name: str, size: int) -> tuple[np.dtype, int]:
    """Dtype of the ids of a `.npy` file, and the byte where they begin."""
    try:
        with os.fdopen(os.dup(descriptor), "rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read = np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            start = stream.tell()
    except Exception as error:  # of any kind: NumPy parses the header as Python
        raise ConfigError(
            f"data.path: {name} is a damaged NumPy array ({reason(error)}); write it again"
        ) from error
    whole = start + math.prod(shape) * dtype.itemsize
    if dtype.kind in "ui" and whole != size:
        raise ConfigError(
            f"data.path: {name} is a damaged NumPy array: it has {size:,} bytes, and its header "
            f"tells of {one_line(f'{whole:,}', 40)}; write it again"
        )
    if dtype.kind not in "ui" or len(shape) != 1:
        raise ConfigError(
            f"data.path: {name} is {one_line(dtype, 40)} of shape {one_line(shape, 40)}; tokens "
            "are one row of uint16 or uint32"
        )
    return dtype, start


def _is_half_of_megatron(file: Path) -> bool:
    """Whether the index of a Megatron data set is beside a file."""
    try:
        index = open_regular(file.with_suffix(".idx"))
    except OSError:
        return False
    try:
        return os.pread(index, len(formats.MEGATRON), 0) == formats.MEGATRON
    finally:
        os.close(index)


def _width(head: bytes, vocab: int) -> int:
    """Bytes of an id in a `.bin` file; two uint16 ids, read as a uint32, exceed the vocabulary.

    So do uint32 ids of another vocabulary, whose upper halves are small beside the lower ones.
    """
    wide = np.frombuffer(head[: len(head) // 4 * 4], "<u4")
    if len(head) % 4:
        return 2
    beyond = len(wide) >= _SURE and (wide >> 16).max() < 1 << 5 and (wide % (1 << 16)).max() >= 4096
    return 4 if beyond or (wide < max(vocab, 1 << 16)).all() else 2


def _other_dtype(head: bytes) -> str:
    """Dtype, not read here, as which the first ids are whole numbers below 2**24; else ""."""
    for dtype in ("<i8", "<f4", "<f8", ">u4"):
        values = np.frombuffer(head[: len(head) // 8 * 8], dtype)
        with np.errstate(invalid="ignore"):
            whole = (values >= 0) & (values < 1 << 24) & (np.floor(values) == values)
        if len(values) >= _SURE and whole.all() and values.any():
            return np.dtype(dtype).name if dtype[0] == "<" else f"big-endian {np.dtype(dtype).name}"
    return ""


def scan(shards: Sequence[Shard], *, eos: int, bos: int | None) -> TokenStream:
    """Finds the documents in one pass over all ids.

    Raises:
      ConfigError: A negative id, or nothing but zeros.
      RunError: A file that became shorter.
    """
    spans, largest, smallest, offset = [], 0, 0, 0
    has_bos = bos is not None and int(shards[0].ids[0]) == bos
    for shard in shards:
        ids, ends = shard.ids, []
        for start in range(0, len(ids), _CHUNK):
            shard.check()
            chunk = ids[start : start + _CHUNK]
            largest, smallest = max(largest, int(chunk.max())), min(smallest, int(chunk.min()))
            ends.append(np.flatnonzero(chunk == eos) + start)
        stops = np.concatenate(ends)
        starts = np.concatenate([[0], stops + 1])
        if not len(stops):
            aim = min(DOCUMENT_TOKENS, max(1, len(ids) // 64))
            starts = np.arange(0, len(ids), aim)
            stops = starts[1:]
        stops = np.concatenate([stops, [len(ids)]])
        if has_bos:
            starts = starts + (ids[np.minimum(starts, len(ids) - 1)] == bos)
        full = stops > starts
        spans.append(np.stack([starts[full], stops[full]], axis=1) + offset)
        offset += len(ids)
    if smallest < 0:
        raise ConfigError(f"data.path: the token files have the id {smallest}; ids start at 0")
    if not largest:
        raise ConfigError("data.path: the token files hold nothing but zeros; write them again")
    return TokenStream(np.concatenate(spans).astype(np.int64), has_bos, largest)


def hashes(shards: Sequence[Shard], spans: np.ndarray) -> np.ndarray:
    """Hash of the ids of each document, [D] int64; equal documents have equal hashes.

    Raises:
      RunError: A file that became shorter.
    """
    widest = max(shard.ids.dtype.itemsize for shard in shards)
    out, document, offset = np.empty(len(spans), np.int64), 0, 0
    for shard in shards:
        while document < len(spans) and spans[document, 0] < offset + len(shard.ids):
            start, stop = spans[document] - offset
            if document % 4096 == 0:
                shard.check()
            ids = shard.ids[start:stop].astype(f"<u{widest}", copy=False)
            digest = hashlib.blake2b(ids.data, digest_size=8).digest()
            out[document] = int.from_bytes(digest, "little", signed=True)
            document += 1
        offset += len(shard.ids)
    return out
