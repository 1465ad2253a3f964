"""Reads safetensors files through a memory map, and writes them one tensor at a time.

The `safetensors` library cannot read FP8 into NumPy, and it writes only tensors that are in memory
all together.

A file is eight bytes (the header's length, little-endian), the header in JSON, and the tensors'
bytes one after another. A folder holds `model.safetensors`, or several files and
`model.safetensors.index.json`, which maps each tensor to its file. Nothing is unpickled.
"""

import dataclasses
import errno
import json
import math
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import shown
from deepseek_jax.precision.fp8_tiles import E4M3

E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)  # powers of two; a dtype of scales alone
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": E4M3,
    "F8_E8M0": E8M0,
}
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit, here also that of a JSON file
_LONGEST_NAME = 500  # characters of a tensor's name


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Place of a tensor in a file; its bytes are read when `array` is used.

    Attributes:
      file: path of the file.
      content: the mapped file.
      start: position of the tensor's first byte in `content`.
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    content: mmap.mmap
    start: int

    @property
    def array(self) -> np.ndarray:
        """A read-only view of the file, which need not be aligned."""
        data = np.frombuffer(self.content, np.uint8, self.nbytes, self.start)
        return data.view(self.dtype).reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def release(self) -> None:
        """Takes the tensor's pages out of this process's memory; they may be read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = self.start // mmap.PAGESIZE * mmap.PAGESIZE
            self.content.madvise(mmap.MADV_DONTNEED, first, self.start - first + self.nbytes)

    def __str__(self) -> str:
        return f"{self.dtype.name}{list(self.shape)}"


def open_folder(folder: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name; only the index and the headers are read.

    Raises:
      ConfigError: no checkpoint or two in the folder, an index and files that do not agree, or a
        damaged file; the message names the file and the tensor.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise ConfigError(f"{folder} holds both {SINGLE} and {INDEX}; remove the one that is stale")
    if single.exists():
        return open_file(single)
    if not index.exists():
        raise ConfigError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; expected a checkpoint in safetensors "
            "format (pickled ones are never read)"
        )
    where = _weight_map(index)
    first = {file: name for name, file in reversed(where.items())}
    for file, name in first.items():
        if not (folder / file).exists():
            raise ConfigError(f"{folder / file} does not exist; {INDEX} expects {name} in it")
    found: dict[str, Tensor] = {}
    for file in sorted(first):
        for name, tensor in _tensors(folder / file):
            if name in found:
                raise ConfigError(
                    f"{name} is in {found[name].file.name} and in {file} of {folder}; expected once"
                )
            if where.get(name) != file:
                raise ConfigError(
                    f"{folder / file} holds {name}, which {INDEX} expects in "
                    f"{where.get(name, 'no file')}"
                )
            found[name] = tensor
    for name, file in where.items():
        if name not in found:
            raise ConfigError(f"{folder / file} does not hold {name}, which {INDEX} expects in it")
    return found


def open_file(file: Path) -> dict[str, Tensor]:
    """Tensors of one file by name; ConfigError for a damaged one."""
    return dict(_tensors(file))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ConfigError if the file does not hold one."""
    return json_object(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """Content of a small file; ConfigError if it cannot be read."""
    try:
        with open(_regular(path), "rb") as stream:
            text = stream.read(LONGEST_HEADER + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > LONGEST_HEADER:
        raise ConfigError(f"{path} has more than {LONGEST_HEADER:,} bytes; expected a JSON object")
    return text


def _regular(path: Path) -> int:
    """A descriptor of a regular file, to read: a pipe or a device could block for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is no regular file", str(path))


def json_object(text: bytes, source: str) -> dict[str, Any]:
    """The JSON object that a text spells; ConfigError, which names `source`, for another text."""

    def once(pairs):
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise ConfigError(f"{source} names {shown(name)} twice; expected once")
            values[name] = value
        return values

    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        raise ConfigError(f"{source} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{source} is {str(value)[:40]!r}; expected a JSON object")
    return value


def _weight_map(index: Path) -> dict[str, str]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ConfigError(f"{index} has no weight_map; expected tensor name -> file name")
    for name, file in where.items():
        _check_name(index, name)
        plain = isinstance(file, str) and file == Path(file).name and "\\" not in file
        plain = plain and file.isprintable() and len(file.encode()) < 256
        if not plain or file in ("", ".", ".."):
            raise ConfigError(
                f"{index} puts {name} in {shown(file)}; expected the name of a file beside it, "
                "without a path"
            )
    return where


def _check_name(file: Path, name: str) -> None:
    """Raises ConfigError for a tensor's name that does not fit into the line of a message."""
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ConfigError(
            f"{file} names a tensor {shown(name)}; expected at most {_LONGEST_NAME} printable "
            "characters"
        )


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with open(_regular(file), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            # An empty file cannot be mapped.
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    length = int.from_bytes(content[:8], "little") if content and size >= 8 else LONGEST_HEADER + 1
    if content is None or length > min(size - 8, LONGEST_HEADER):
        raise ConfigError(
            f"{file} has {size} bytes, which do not hold a safetensors header; it is truncated, or "
            "not a safetensors file"
        )
    header = json_object(content[8 : 8 + length], f"the header of {file}")
    header.pop("__metadata__", None)
    first, available = 8 + length, size - 8 - length
    for name, entry in header.items():
        _check_name(file, name)
        _check_entry(file, name, entry)
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        expected = math.prod(shape) * dtype.itemsize
        if start != position or end - start != expected:
            raise ConfigError(
                f"{file}: {name} is at bytes {start} to {end}, expected {position} to "
                f"{position + expected} for {entry['dtype']}{list(shape)}"
            )
        if end > available:
            raise ConfigError(
                f"{file}: {name} ends at byte {end} of the data, found {available}; the file is "
                "truncated"
            )
        yield name, Tensor(file, dtype, shape, content, first + start)
        position = end
    if position != available:
        raise ConfigError(f"{file}: {available - position} bytes after the last tensor, expected 0")


def _check_entry(file: Path, name: str, entry: Any) -> None:
    """Raises ConfigError unless a header's entry has the three fields of the format."""
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets = (
        value if isinstance(value, list) and all(type(x) is int and x >= 0 for x in value) else None
        for value in (fields.get("shape"), fields.get("data_offsets"))
    )
    if shape is None or offsets is None or len(offsets) != 2:
        raise ConfigError(
            f"{file}: the header says {shown(entry)} of {name}; expected dtype, shape and "
            "data_offsets"
        )
    if not isinstance(fields.get("dtype"), str) or fields["dtype"] not in DTYPES:
        raise ConfigError(
            f"{file}: {name} is {repr(str(fields.get('dtype')))[1:-1][:40]}{shown(shape)}; "
            f"expected one of {', '.join(DTYPES)}"
        )


def write(
    file: Path,
    expected: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes a file with one tensor at a time in memory.

    Args:
      expected: dtype and shape of every tensor by name.
      tensors: the same names, in any order, with their values.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide dtypes first, so that each tensor starts at a multiple of its dtype's width.
    for name, (dtype, shape) in sorted(expected.items(), key=lambda item: -item[1][0].itemsize):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    left = set(expected)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, value in tensors:
            assert (value.dtype, value.shape) == expected[name], name
            stream.seek(8 + len(text) + header[name]["data_offsets"][0])
            stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            left.remove(name)
    assert not left, left


def write_raw(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors of other files as they are."""
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write(file, expected, ((name, tensor.array) for name, tensor in tensors.items()))
    for tensor in tensors.values():
        tensor.release()
