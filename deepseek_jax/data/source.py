"""Text documents as a random-access sequence, from text, JSONL and Parquet files.

A document is one of:
  - the field `data.text_key` of a JSONL or Parquet row;
  - a UTF-8 file of a folder; hidden and binary files are skipped;
  - a piece of a text file that is given by itself or has at least 1 MiB: the text between
    `<|endoftext|>` marks or, without such marks, paragraphs of about 4 KiB together.

An empty path gives the source files of Python's standard library. Files are read when a document is
requested; every error in them is a `ConfigError`.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
import re
import sysconfig
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from deepseek_jax.config import ConfigError

TEXT_MARK = b"<|endoftext|>"
DOCUMENT_BYTES = 4096  # target size of a piece of text without marks
WHOLE_FILE_BYTES = 1 << 20  # a smaller file of a folder is one document
WHOLE = 1 << 62  # more bytes than any file has
TOKEN_SUFFIXES = (".npy", ".bin")
NOT_LIBRARY = (
    "test", "tests", "idlelib", "lib2to3", "ensurepip", "site-packages", "dist-packages",
)  # fmt: skip

_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n\s*")


class Source(Protocol):
    """Text documents by number.

    Attributes:
      digest: Hash of their content.
    """

    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


def open_source(
    path: str, text_key: str, say: Callable[[str], None], *, whole: bool = False
) -> Source:
    """Opens the text documents at `data.path`.

    Args:
      path: `data.path`; "" for Python's standard library.
      text_key: `data.text_key`.
      say: Receives a line on skipped files.
      whole: True makes every text file one document, whatever its length.

    Raises:
      ConfigError: No such path, no text in it, or rows without `data.text_key`.
    """
    if not path:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in folder_files(root, NOT_LIBRARY) if file.suffix == ".py"]
        return _folder(files, f"{root}, the standard library of data.path='',", "", say)
    root = existing(path)
    files = [root]
    if root.is_dir():
        files = folder_files(root)
    if len(files) == 1:
        return _open_file(files[0], text_key, WHOLE if whole else 0)
    return _folder(
        files, f"the folder data.path={path!r}", text_key, say, WHOLE if whole else WHOLE_FILE_BYTES
    )


def token_files(path: str) -> list[Path]:
    """Token files (`.npy`, `.bin`) at `data.path`; none unless all files are such."""
    if not path:
        return []
    root = existing(path)
    files = [root] if root.is_file() else folder_files(root)
    tokens = [file for file in files if _suffix(file) in TOKEN_SUFFIXES]
    return tokens if len(tokens) == len(files) else []


def existing(path: str) -> Path:
    """`data.path` as a path.

    Raises:
      ConfigError: Neither a file nor a folder.
    """
    root = Path(path).expanduser()
    if not (root.is_file() or root.is_dir()):
        found = "is neither a file nor a folder" if root.exists() else "does not exist"
        raise ConfigError(
            f"data.path={path!r} {found} (looked for {root.absolute()}); give a text, JSONL, "
            "Parquet or token file, or a folder of them"
        )
    return root


def folder_files(root: Path, skip: Collection[str] = ()) -> list[Path]:
    """Files under a folder, sorted, without hidden ones and without folders named in `skip`."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f[0] != "." and f not in (*skip, "__pycache__"))
        found += (Path(folder, name) for name in sorted(names) if name[0] != ".")
    return [file for file in found if file.is_file()]


def _folder(
    files: list[Path],
    where: str,
    text_key: str,
    say: Callable[[str], None],
    whole_below: int = WHOLE_FILE_BYTES,
) -> Source:
    """Documents of several files; files that are not text are skipped and reported."""
    parts: list[Source] = []
    skipped: list[str] = []
    for file in files:
        if _suffix(file) in _ROWS:
            parts.append(_ROWS[_suffix(file)](file, text_key))
        elif _suffix(file) in TOKEN_SUFFIXES:
            skipped.append(f"{file} is not text; token files need a folder without other files")
        elif file.stat().st_size:
            try:
                parts.append(TextFile(file, whole_below))
            except _NotTextError as error:
                skipped.append(str(error))
    if not any(len(part) for part in parts):
        reason = f"; the first skipped file: {skipped[0]}" if skipped else ""
        raise ConfigError(f"{where} holds no text{reason}; set data.path to files with text")
    if skipped:
        say(f"data: skipped {len(skipped)} files; the first: {skipped[0]}")
    return Joined(parts)


def _open_file(file: Path, text_key: str, whole_below: int) -> Source:
    """Documents of a file that is given by itself; ConfigError if there are none."""
    rows = _ROWS.get(_suffix(file))
    source = rows(file, text_key) if rows else TextFile(file, whole_below)
    if not len(source):
        raise ConfigError(f"data.path: {file} is empty; set data.path to files with text")
    return source


class _NotTextError(ConfigError):
    """Error of a file that is not UTF-8 text."""


class TextFile:
    """UTF-8 file: one document if it is smaller than `whole_below` bytes, else its pieces."""

    def __init__(self, file: Path, whole_below: int):
        self._file = file
        try:
            data = file.read_bytes()
        except OSError as error:
            raise _NotTextError(f"data.path: {file} cannot be read: {error.strerror}") from error
        if (zero := data.find(b"\0")) >= 0:
            raise _NotTextError(
                f"{file} is a binary file (byte {zero} is zero); data.path needs UTF-8 text, "
                "JSONL, Parquet, or tokens in .npy or .bin files"
            )
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise _NotTextError(
                f"{file} is not UTF-8 (byte {error.start} is {data[error.start]:#04x}); convert "
                "it, or set data.path to other files"
            ) from error
        self.digest = _digest(data)
        self._spans = [(0, len(data))] if len(data) < whole_below else _pieces(data)
        if not data.strip():
            self._spans = []

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        start, stop = self._spans[index]
        with self._file.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start).decode()


def _pieces(data: bytes) -> list[tuple[int, int]]:
    """Spans of the documents of a text, in bytes."""
    if TEXT_MARK in data:
        marks = [match.span() for match in re.finditer(re.escape(TEXT_MARK), data)]
        starts = [0, *(stop for _, stop in marks)]
        stops = [*(start for start, _ in marks), len(data)]
        return [(a, b) for a, b in zip(starts, stops, strict=True) if data[a:b].strip()]
    aim = min(DOCUMENT_BYTES, max(1, len(data) // 64))  # a short text has documents to hold out too
    cuts = [0]
    while cuts[-1] + aim < len(data):
        cuts.append(_cut(data, cuts[-1] + aim, min(cuts[-1] + 4 * aim, len(data))))
    if cuts[-1] < len(data):
        cuts.append(len(data))
    return list(itertools.pairwise(cuts))


def _cut(data: bytes, first: int, last: int) -> int:
    """End of a piece from `first` to `last`: after a blank line, a line, a word or a character."""
    if blank := _BLANK_LINE.search(data, first - 1, last):
        return blank.end()
    for end in (b"\n", b" "):
        if (found := data.find(end, first - 1, last)) >= 0:
            return found + 1
    while last < len(data) and data[last] & 0xC0 == 0x80:  # never inside a character
        last += 1
    return last


class JsonLines:
    """JSONL file: one JSON object per line; blank lines are not rows."""

    def __init__(self, file: Path, text_key: str):
        self._file, self._key = file, text_key
        self._lines: list[tuple[int, int]] = []  # (offset in bytes, line number from 1)
        hasher, offset = hashlib.blake2b(digest_size=16), 0
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    self._lines.append((offset, number))
                hasher.update(line)
                offset += len(line)
        self.digest = f"{hasher.hexdigest()} {text_key}"

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> str:
        offset, number = self._lines[index]
        with self._file.open("rb") as stream:
            stream.seek(offset)
            line = stream.readline()
        where = f"{self._file} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:  # encoding or JSON
            raise ConfigError(
                f"{where} is not JSON ({error}); data.path needs one JSON object per line"
            ) from error
        if not isinstance(row, dict) or self._key not in row:
            keys = f"keys {', '.join(map(repr, row))}" if isinstance(row, dict) else "no keys"
            raise ConfigError(
                f"{where} has no field data.text_key={self._key!r}; it has {keys}: set "
                "data.text_key to the field that holds the text"
            )
        return _as_text(row[self._key], where, self._key)


class Parquet:
    """Parquet file; the last row group read is cached."""

    def __init__(self, file: Path, text_key: str):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError(
                f"data.path has the Parquet file {file}, which needs pyarrow: "
                "pip install 'deepseek_jax[parquet]'"
            ) from error
        self._file, self._key = file, text_key
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, hashlib.blake2b).hexdigest()
        self.digest = f"{content} {text_key}"
        try:
            self._parquet = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise ConfigError(f"data.path: {file} is not a Parquet file ({error})") from error
        columns = self._parquet.schema_arrow.names
        if text_key not in columns:
            raise ConfigError(
                f"{file} has no column data.text_key={text_key!r}; it has {', '.join(columns)}: "
                "set data.text_key to the column that holds the text"
            )
        meta = self._parquet.metadata
        rows = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self._starts = [0, *itertools.accumulate(rows)]
        self._group = functools.lru_cache(maxsize=1)(self._read_group)

    def _read_group(self, group: int) -> Any:
        return self._parquet.read_row_group(group, columns=[self._key]).column(0)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> str:
        group = bisect.bisect_right(self._starts, index) - 1
        value = self._group(group)[index - self._starts[group]].as_py()
        return _as_text(value, f"{self._file} row {index + 1}", self._key)


class Joined:
    """Concatenation of several sources."""

    def __init__(self, parts: Sequence[Source]):
        self._parts = parts
        self._starts = [0, *itertools.accumulate(len(part) for part in parts)]
        self.digest = _digest("\n".join(part.digest for part in parts).encode())

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> str:
        part = bisect.bisect_right(self._starts, index) - 1
        return self._parts[part][index - self._starts[part]]


_ROWS: dict[str, Callable[[Path, str], Source]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".parquet": Parquet,
}


def _as_text(value: Any, where: str, key: str) -> str:
    """Text of a row; null is an empty document."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: data.text_key={key!r} holds {type(value).__name__}, not text; set "
            "data.text_key to a field with text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: data.text_key={key!r} has half a surrogate pair at character "
            f"{error.start}, which is not text; repair the row or set data.path to another file"
        ) from error
    return value


def _suffix(file: Path) -> str:
    return file.suffix.lower()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
