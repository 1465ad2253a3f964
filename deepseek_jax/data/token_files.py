"""Token files: ids of an external tokenizer, memory-mapped in place.

A `.npy` file has one row of integers. A `.bin` file has bare little-endian ids: uint32 if the first
ids, read as uint32, are all below `model.vocab` (or 65,536), else uint16. Documents end at the
end-of-text id; a stream without that id is cut into pieces of about 4,096 tokens. If the first
document begins with BOS, BOS is expected before every document.
"""

import dataclasses
from pathlib import Path

import numpy as np

from deepseek_jax.config import ConfigError

DOCUMENT_TOKENS = 4096  # size of pieces of a stream without end-of-text id
_CHUNK = 1 << 24  # ids
_HEAD = 1 << 16  # bytes


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """Concatenated token files, and the D documents in them.

    Attributes:
      shards: Ids of each file, memory-mapped.
      spans: [D, 2] int64, start and stop of each document over all shards, without marks.
      has_bos: True if documents begin with BOS.
      largest: Largest id.
    """

    shards: tuple[np.ndarray, ...]
    spans: np.ndarray
    has_bos: bool
    largest: int


def open_shard(file: Path, vocab: int) -> np.ndarray:
    """Maps the ids of a token file into memory, [N].

    Raises:
      ConfigError: A file that has no ids.
    """
    if file.suffix.lower() == ".npy":
        try:
            ids = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ConfigError(f"data.path: {file} is not a NumPy array ({error})") from error
        if ids.dtype.kind not in "ui" or ids.ndim != 1:
            raise ConfigError(
                f"data.path: {file} is {ids.dtype} of shape {ids.shape}; tokens are one row of "
                "uint16 or uint32"
            )
    else:
        width, size = _width(file, vocab), file.stat().st_size
        if size % width:
            raise ConfigError(
                f"data.path: {file} has {size} bytes, which is no whole number of uint16 or "
                "uint32 ids; convert it to .npy"
            )
        ids = np.memmap(file, f"<u{width}", "r") if size else np.zeros(0, "<u2")
    if not len(ids):
        raise ConfigError(f"data.path: {file} is empty")
    return ids.view(np.ndarray)  # a plain array: slices of np.memmap are slow


def _width(file: Path, vocab: int) -> int:
    """Bytes of an id in a `.bin` file; two uint16 ids, read as a uint32, exceed the vocabulary."""
    with file.open("rb") as stream:
        head = stream.read(_HEAD)
    wide = np.frombuffer(head[: len(head) // 4 * 4], "<u4")
    return 4 if len(head) % 4 == 0 and (wide < max(vocab, 1 << 16)).all() else 2


def scan(shards: tuple[np.ndarray, ...], *, eos: int, bos: int | None) -> TokenStream:
    """Finds the documents in one pass over all ids.

    Raises:
      ConfigError: A negative id.
    """
    spans, largest, smallest, offset = [], 0, 0, 0
    has_bos = bos is not None and int(shards[0][0]) == bos
    for ids in shards:
        ends = []
        for start in range(0, len(ids), _CHUNK):
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
    return TokenStream(shards, np.concatenate(spans).astype(np.int64), has_bos, largest)
