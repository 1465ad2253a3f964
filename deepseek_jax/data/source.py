"""Text documents as a random-access sequence, from text, JSON and Parquet files.

A document is one of:
  - the field `data.text_key` of a row: a line of JSON lines, an object of a JSON array, or a row of
    Parquet;
  - a UTF-8 file of a folder; hidden and binary files are skipped;
  - a piece of a text file that is given by itself or has at least 1 MiB: the text between
    `<|endoftext|>` marks or, without such marks, paragraphs of about 4 KiB together.

The content of a file tells its format, and whether it is compressed with gzip, bzip2, xz or
Zstandard; its name may only promise one. An empty path gives the source files of Python's standard
library (`library.py`). Files are read when a document is requested; every error in them is a
`ConfigError`.
"""

import bisect
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import one_line
from deepseek_jax.data import files as listing
from deepseek_jax.data import formats, library
from deepseek_jax.data.files import Content, resolve
from deepseek_jax.data.rows import (
    JsonArray,
    JsonLines,
    Parquet,
    begins_with_rows,
    first_lines,
    parse_array,
)
from deepseek_jax.errors import reason

TEXT_MARK = b"<|endoftext|>"
DOCUMENT_BYTES = 4096  # target size of a piece of text without marks
WHOLE_FILE_BYTES = 1 << 20  # a smaller file of a folder is one document
WHOLE = 1 << 62  # more bytes than any file has
TOKEN_SUFFIXES = (".npy", ".bin")
LINE_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv")
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")

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
    path: str,
    text_key: str,
    say: Callable[[str], None],
    *,
    whole: bool = False,
    tables: bool = False,
) -> Source:
    """Opens the text documents at `data.path`.

    Args:
      path: `data.path`; "" for Python's standard library.
      text_key: `data.text_key`.
      say: Receives a line on skipped files.
      whole: True makes every text file one document, whatever its length.
      tables: True keeps the tables of the standard library, as older runs did.

    Raises:
      ConfigError: No such path, no text in it, or rows without `data.text_key`.
    """
    if not path:
        root = library.root()
        found = library.modules(root, tables=tables)
        return _folder(found, [], f"{root}, the standard library of data.path='',", "", say)
    root = existing(path)
    if not root.is_dir():
        return _alone(root, text_key, WHOLE if whole else 0)
    found, left_out = listing.under(root)
    if len(found) == 1 and not left_out:
        return _alone(found[0], text_key, WHOLE if whole else 0)
    where = f"the folder data.path={one_line(path)!r}"
    return _folder(found, left_out, where, text_key, say, WHOLE if whole else WHOLE_FILE_BYTES)


def token_files(path: str) -> list[Path]:
    """Token files (`.npy`, `.bin`, or NumPy arrays) at `data.path`; none unless all are such.

    Raises:
      ConfigError: A file or folder that cannot be read, or an entry of a folder that is no file,
        such as a broken link to a token file.
    """
    if not path:
        return []
    root = existing(path)
    found, left_out = listing.under(root) if root.is_dir() else ([root], [])
    if not found or not all(map(_has_tokens, found)):
        return []
    if left_out:
        raise ConfigError(
            f"data.path={one_line(path)!r} holds token files, and {left_out[0]}; remove it, or "
            "repair it"
        )
    return found


def _has_tokens(file: Path) -> bool:
    """Whether a file is one of ids: by its name, which is checked later, or by its content."""
    return _suffix(file) in TOKEN_SUFFIXES or Content(file).head.startswith(formats.NPY)


def existing(path: str) -> Path:
    """`data.path` as a path.

    Raises:
      ConfigError: Neither a file nor a folder.
    """
    root = resolve("data.path", path)
    try:
        if root.is_file() or root.is_dir():
            return root
        found = "is neither a file nor a folder" if root.exists() else "does not exist"
    except OSError as error:
        found = f"cannot be read ({reason(error)})"
    raise ConfigError(
        f"data.path={one_line(path)!r} {found} (looked for {one_line(root.absolute())}); give a "
        "text, JSONL, Parquet or token file, or a folder of them"
    )


def _folder(
    found: list[Path],
    left_out: list[str],
    where: str,
    text_key: str,
    say: Callable[[str], None],
    whole_below: int = WHOLE_FILE_BYTES,
) -> Source:
    """Documents of several files; files that are not text are skipped and reported."""
    parts: list[Source] = []
    skipped, other_json = list(left_out), []
    token_bytes = read_bytes = 0
    for file in found:
        content = Content(file)
        if _suffix(file) in TOKEN_SUFFIXES or content.head.startswith(formats.NPY):
            token_bytes += content.size
            skipped.append(
                f"{content.name} is not text; token files need a folder without other files"
            )
        elif content.size:
            try:
                rows = _rows(content, text_key)
                if rows is None and _is_json(content):
                    other_json.append(content.name)
                parts.append(TextFile(content, whole_below) if rows is None else rows)
                read_bytes += content.size
            except _NotTextError as error:
                skipped.append(str(error))
    if not any(len(part) for part in parts):
        reasons = f"; the first skipped file: {skipped[0]}" if skipped else ""
        raise ConfigError(f"{where} holds no text{reasons}; set data.path to files with text")
    if token_bytes > read_bytes:
        raise ConfigError(
            f"{where} holds {token_bytes:,} bytes of token files beside {read_bytes:,} bytes of "
            "text; put the token files into a folder of their own"
        )
    _report(where, parts, skipped, other_json, text_key, say)
    return Joined(parts)


def _report(
    where: str,
    parts: list[Source],
    skipped: list[str],
    other_json: list[str],
    text_key: str,
    say: Callable[[str], None],
) -> None:
    """Says what of a folder is not read, or not as rows; ConfigError if that is all of it."""
    if other_json and len(other_json) == len(parts):
        raise ConfigError(
            f"{where} holds JSON files without rows that have data.text_key="
            f"{one_line(text_key)!r}; the first: {other_json[0]}. Set data.text_key to the field "
            "that holds the text"
        )
    if other_json:
        say(
            f"data: {len(other_json)} JSON files have no rows with the field "
            f"{one_line(text_key)!r} and are read as plain text; the first: {other_json[0]}"
        )
    if skipped:
        say(f"data: skipped {len(skipped)} files; the first: {skipped[0]}")


def _alone(file: Path, text_key: str, whole_below: int) -> Source:
    """Documents of a file that is given by itself; ConfigError if there are none."""
    content = Content(file)
    source = _rows(content, text_key)
    if source is None and len(first_lines(content)) == 2:
        source = JsonLines(content, text_key)  # whose first row names what is wrong
    if source is None and (_is_json(content) or _is_one_value(content)):
        where = f"data.path: {content.name}"
        rows = parse_array(content)
        raise ConfigError(
            f"{where} is JSON, but no row of it has the field data.text_key="
            f"{one_line(text_key)!r}; data.path needs one JSON object per line, or an array of "
            "objects"
            if rows
            else f"{where} is empty; set data.path to files with text"
        )
    source = TextFile(content, whole_below) if source is None else source
    if not len(source):
        raise ConfigError(f"data.path: {content.name} is empty; set data.path to files with text")
    return source


def _rows(content: Content, text_key: str) -> Source | None:
    """Rows of a file, by its content and by what its name promises; None for plain text.

    Raises:
      ConfigError: Rows that cannot be read, or a file that is not what its name promises.
      _NotTextError: A file of another format.
    """
    if content.packed:
        content.unpack(lambda: _check_inside(content))
    suffix = _suffix(content.path)
    if formats.is_parquet(content.head) or suffix == ".parquet":
        return Parquet(content, text_key)
    _check_format(content)
    lines = first_lines(content)
    if any(isinstance(row, dict) and text_key in row for row in lines):
        return JsonLines(content, text_key)
    array = _array(content, text_key, suffix)
    if array is None and (suffix in LINE_SUFFIXES or (suffix == ".json" and len(lines) == 2)):
        return JsonLines(content, text_key)  # whose first row names what is wrong
    if suffix in TABLE_SUFFIXES:
        _check_table(content, text_key)
    return array


def _check_inside(content: Content) -> None:
    """Refuses a compressed file whose first unpacked bytes are neither text nor rows."""
    if formats.is_parquet(content.head) or content.head.startswith(formats.NPY):
        seen = formats.looks_like(content.head)
        raise _NotTextError(
            f"data.path: {content.name} is {seen} inside {content.packed} data; unpack it"
        )
    _check_format(content)


def _check_format(content: Content) -> None:
    """Refuses a format that is not read here."""
    if message := formats.refused(content):
        raise _NotTextError(f"{message}; set data.path to other files")


def _array(content: Content, text_key: str, suffix: str) -> Source | None:
    """Rows of a JSON array, or of the one object of a `.json` file; None for anything else."""
    start = content.head.removeprefix(formats.BOM).lstrip()[:1]
    if start != b"[" and (start != b"{" or suffix != ".json"):
        return None
    try:
        rows = parse_array(content)
    except ConfigError:
        return None  # one that is given by itself is parsed again, and the error told
    if suffix in LINE_SUFFIXES or any(isinstance(row, dict) and text_key in row for row in rows):
        return JsonArray(content, text_key, rows)
    return None


def _check_table(content: Content, text_key: str) -> None:
    """Refuses a table with a column of text, which is no plain text."""
    header = content.head.removeprefix(formats.BOM).partition(b"\n")[0].decode(errors="replace")
    if text_key in (name.strip(' \t\r"') for name in re.split("[,;\t]", header)):
        raise ConfigError(
            f"data.path: {content.name} is a table with the column {one_line(text_key)!r}; write "
            "it as JSONL or Parquet"
        )


def _is_json(content: Content) -> bool:
    """Whether a file has, or promises, JSON rows."""
    if begins_with_rows(content.head):
        return True
    return _suffix(content.path) == ".json" and bool(content.all().strip())


def _is_one_value(content: Content) -> bool:
    """Whether a file is a JSON array or object as a whole."""
    if not content.head.removeprefix(formats.BOM).lstrip().startswith((b"{", b"[")):
        return False
    try:
        return bool(parse_array(content))
    except ConfigError:
        return False


class _NotTextError(ConfigError):
    """Error of a file that is not UTF-8 text."""


class TextFile:
    """UTF-8 file: one document if it is smaller than `whole_below` bytes, else its pieces."""

    def __init__(self, content: Content, whole_below: int):
        self._content = content
        data = content.all()
        if (zero := data.find(b"\0")) >= 0:
            raise _NotTextError(
                f"data.path: {content.name} is a binary file (byte {zero} is zero); data.path "
                "needs UTF-8 text, JSONL, Parquet, or tokens in .npy or .bin files"
            )
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise _NotTextError(
                f"data.path: {content.name} is not UTF-8 (byte {error.start} is "
                f"{data[error.start]:#04x}); convert it, or set data.path to other files"
            ) from error
        self.digest = digest(data)
        first = len(formats.BOM) if data.startswith(formats.BOM) else 0
        self._spans = [(first, len(data))] if len(data) < whole_below else _pieces(data, first)
        if not data[first:].strip():
            self._spans = []

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        return self._content.read(*self._spans[index]).decode()


def _pieces(data: bytes, first: int) -> list[tuple[int, int]]:
    """Spans of the documents of a text from byte `first` on."""
    if TEXT_MARK in data:
        marks = [match.span() for match in re.finditer(re.escape(TEXT_MARK), data)]
        starts = [first, *(stop for _, stop in marks)]
        stops = [*(start for start, _ in marks), len(data)]
        return [(a, b) for a, b in zip(starts, stops, strict=True) if data[a:b].strip()]
    aim = min(DOCUMENT_BYTES, max(1, len(data) // 64))  # a short text has documents to hold out too
    cuts = [first]
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


class Joined:
    """Concatenation of several sources."""

    def __init__(self, parts: Sequence[Source]):
        self._parts = parts
        self._starts = [0, *itertools.accumulate(len(part) for part in parts)]
        self.digest = digest(
            "\n".join(part.digest for part in parts).encode(errors="surrogatepass")
        )

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> str:
        part = bisect.bisect_right(self._starts, index) - 1
        return self._parts[part][index - self._starts[part]]


def _suffix(file: Path) -> str:
    """Ending of a file's name, in lower case and without that of a compression."""
    name, last = os.path.splitext(file.name.lower())
    return os.path.splitext(name)[1] if last in PACKED_SUFFIXES else last


def digest(data: bytes) -> str:
    """Hash of some bytes, for keys of the cache."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
