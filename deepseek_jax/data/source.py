"""Documents of text as a random-access sequence, whatever they are kept in.

What counts as a document:
  - a JSONL or Parquet row: the field that `data.text_key` names;
  - a file of a folder, if it is UTF-8 text; hidden files and binaries are left out;
  - a piece of a text file that is given by itself, or that holds a MiB or more: what stands between
    `<|endoftext|>` marks if it has them, else runs of paragraphs of about 4 KiB, which together
    are the whole file.

With no path the documents are the Python standard library's own source files. Files are read when
a document is asked for; everything that can be wrong with them is a `ConfigError`.
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
DOCUMENT_BYTES = 4096  # aimed at in a text without marks
WHOLE_FILE_BYTES = 1 << 20  # in a folder, a smaller file is one document
WHOLE = 1 << 62  # bytes that no file has
TOKEN_SUFFIXES = (".npy", ".bin")
NOT_LIBRARY = (
    "test", "tests", "idlelib", "lib2to3", "ensurepip", "site-packages", "dist-packages",
)  # fmt: skip

_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n\s*")


class Source(Protocol):
    """Documents by number. `digest` is of their content: it changes when any of them does."""

    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


def open_source(
    path: str, text_key: str, say: Callable[[str], None], *, whole: bool = False
) -> Source:
    """The text documents at `data.path`; "" is the standard library.

    Args:
      whole: a text file is one document, whatever its length.

    Raises:
      ConfigError: nothing there, nothing in it, not text, or rows without `data.text_key`.
    """
    if not path:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in folder_files(root, NOT_LIBRARY) if file.suffix == ".py"]
        return _folder(files, f"{root}, the standard library that data.path='' means,", "", say)
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
    """The `.npy` and `.bin` files at `data.path`; none if it holds text."""
    if not path:
        return []
    root = existing(path)
    files = [root] if root.is_file() else folder_files(root)
    tokens = [file for file in files if _suffix(file) in TOKEN_SUFFIXES]
    return tokens if len(tokens) == len(files) else []


def existing(path: str) -> Path:
    """`data.path`, which must exist."""
    root = Path(path).expanduser()
    if not (root.is_file() or root.is_dir()):
        found = "is neither a file nor a folder" if root.exists() else "does not exist"
        raise ConfigError(
            f"data.path={path!r} {found} (looked for {root.absolute()}); give a text, JSONL, "
            "Parquet or token file, or a folder of them"
        )
    return root


def folder_files(root: Path, skip: Collection[str] = ()) -> list[Path]:
    """Every file under a folder, by name; hidden ones and folders called as in `skip` left out."""
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
    """All the documents of several files; those that are not text are left out, and counted."""
    parts: list[Source] = []
    left_out: list[str] = []
    for file in files:
        if _suffix(file) in _ROWS:
            parts.append(_ROWS[_suffix(file)](file, text_key))
        elif _suffix(file) in TOKEN_SUFFIXES:
            left_out.append(f"{file} is not text; token files need a folder without other files")
        elif file.stat().st_size:
            try:
                parts.append(TextFile(file, whole_below))
            except _NotTextError as error:
                left_out.append(str(error))
    if not any(len(part) for part in parts):
        reason = f"; the first file left out: {left_out[0]}" if left_out else ""
        raise ConfigError(f"{where} holds no text{reason}; set data.path to files with text")
    if left_out:
        say(f"data: left out {len(left_out)} files; the first: {left_out[0]}")
    return Joined(parts)


def _open_file(file: Path, text_key: str, whole_below: int) -> Source:
    """The documents of a file that is given by itself, which must have some."""
    rows = _ROWS.get(_suffix(file))
    source = rows(file, text_key) if rows else TextFile(file, whole_below)
    if not len(source):
        raise ConfigError(f"data.path: {file} is empty; set data.path to files with text")
    return source


class _NotTextError(ConfigError):
    """A file that is not UTF-8 text."""


class TextFile:
    """A UTF-8 file: one document if it is smaller than `whole_below` bytes, else its pieces."""

    def __init__(self, file: Path, whole_below: int):
        self._file = file
        try:
            data = file.read_bytes()
        except OSError as error:
            raise _NotTextError(f"data.path: {file} cannot be read: {error.strerror}") from error
        if (zero := data.find(b"\0")) >= 0:
            raise _NotTextError(
                f"{file} is a binary file (byte {zero} is zero); data.path takes UTF-8 text, "
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
    """Where the documents of a text start and stop, in bytes."""
    if TEXT_MARK in data:
        marks = [match.span() for match in re.finditer(re.escape(TEXT_MARK), data)]
        starts = [0, *(stop for _, stop in marks)]
        stops = [*(start for start, _ in marks), len(data)]
        return [(a, b) for a, b in zip(starts, stops, strict=True) if data[a:b].strip()]
    aim = min(DOCUMENT_BYTES, max(1, len(data) // 64))  # a short text still gives some to hold out
    cuts = [0]
    while cuts[-1] + aim < len(data):
        cuts.append(_cut(data, cuts[-1] + aim, min(cuts[-1] + 4 * aim, len(data))))
    if cuts[-1] < len(data):
        cuts.append(len(data))
    return list(itertools.pairwise(cuts))


def _cut(data: bytes, first: int, last: int) -> int:
    """The best place to end a piece: after a blank line, a line, a word or a character."""
    if blank := _BLANK_LINE.search(data, first - 1, last):
        return blank.end()
    for end in (b"\n", b" "):
        if (found := data.find(end, first - 1, last)) >= 0:
            return found + 1
    while last < len(data) and data[last] & 0xC0 == 0x80:  # never inside a character
        last += 1
    return last


class JsonLines:
    """One JSON object a line; blank lines are not rows."""

    def __init__(self, file: Path, text_key: str):
        self._file, self._key = file, text_key
        self._lines: list[tuple[int, int]] = []  # offset in bytes, number from 1
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
        except ValueError as error:  # of the encoding or of the JSON
            raise ConfigError(
                f"{where} is not JSON ({error}); data.path needs one a line"
            ) from error
        if not isinstance(row, dict) or self._key not in row:
            keys = f"keys {', '.join(map(repr, row))}" if isinstance(row, dict) else "no keys"
            raise ConfigError(
                f"{where} has no field data.text_key={self._key!r}; it has {keys}: set "
                "data.text_key to the one that holds the text"
            )
        return _as_text(row[self._key], where, self._key)


class Parquet:
    """Rows of a Parquet file; the row group last read is kept."""

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
                "set data.text_key to the one that holds the text"
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
    """Several sources, one after another."""

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
    """A row's text; null is an empty document."""
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
            f"{where}: data.text_key={key!r} holds half of a surrogate pair at character "
            f"{error.start}, which is not text; repair the row or set data.path to another file"
        ) from error
    return value


def _suffix(file: Path) -> str:
    return file.suffix.lower()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
