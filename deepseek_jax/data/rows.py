"""Rows of JSON and Parquet files: each has its text in the field `data.text_key`."""

import bisect
import codecs
import functools
import hashlib
import itertools
import json
from typing import Any

from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import one_line
from deepseek_jax.data.files import Content
from deepseek_jax.data.formats import BOM, looks_like
from deepseek_jax.errors import reason


class JsonLines:
    """JSON file with one object per line; blank lines are not rows."""

    def __init__(self, content: Content, text_key: str):
        self._content, self._key = content, text_key
        self._lines: list[tuple[int, int, int]] = []  # (start and stop in bytes, line from 1)
        hasher, offset = hashlib.blake2b(digest_size=16), 0
        for number, line in enumerate(content.lines(), start=1):
            if line.strip():
                self._lines.append((offset, offset + len(line), number))
            hasher.update(line)
            offset += len(line)
        self.digest = f"{hasher.hexdigest()} {text_key}"

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> str:
        start, stop, number = self._lines[index]
        line = self._content.read(start, stop)
        where = f"{self._content.name} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # encoding, JSON or depth
            seen = looks_like(line)
            seen = "" if seen == "JSON" else f" but {seen}"
            raise ConfigError(
                f"{where} is not JSON ({reason(error)}){seen}; data.path needs one JSON object "
                "per line"
            ) from error
        return text_of(row, where, self._key)


class JsonArray:
    """JSON file with one array of objects, whose texts are held in memory."""

    def __init__(self, content: Content, text_key: str, rows: list[Any]):
        self._rows, self._key, self._name = rows, text_key, content.name
        content_hash = hashlib.blake2b(content.all(), digest_size=16).hexdigest()
        self.digest = f"{content_hash} array {text_key}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        return text_of(self._rows[index], f"{self._name} row {index + 1}", self._key)


def parse_array(content: Content) -> list[Any]:
    """Elements of a JSON array, or the one object of a file.

    Raises:
      ConfigError: A file that is neither.
    """
    try:
        found = json.loads(content.all())
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"data.path: {content.name} is not JSON ({reason(error)}); data.path needs one JSON "
            "object per line, or an array of objects"
        ) from error
    if isinstance(found, dict):
        return [found]
    if not isinstance(found, list):
        raise ConfigError(
            f"data.path: {content.name} is JSON without rows; data.path needs one JSON object per "
            "line, or an array of objects"
        )
    return found


def first_lines(content: Content, most: int = 2) -> list[Any]:
    """First lines of a file as JSON values; fewer where a line is not JSON."""
    rows: list[Any] = []
    if not content.head.removeprefix(BOM).lstrip().startswith(b"{"):
        return rows
    for line in content.lines():
        if len(rows) == most:
            break
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                break
    return rows


def begins_with_rows(head: bytes) -> bool:
    """Whether a file begins with a JSON object that another one follows, in an array or not."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head.removeprefix(BOM)).lstrip()
    text = text.removeprefix("[").lstrip()
    try:
        row, stop = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    rest = text[stop:].lstrip(" \t\r\n,]")
    return isinstance(row, dict) and rest.startswith("{")


class Parquet:
    """Parquet file; the last row group read is cached."""

    def __init__(self, content: Content, text_key: str):
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError(
                f"data.path has the Parquet file {content.name}, which needs pyarrow: "
                "pip install 'deepseek_jax[parquet]'"
            ) from error
        self._content, self._key = content, text_key
        hasher = hashlib.blake2b()
        for start in range(0, content.size, 1 << 24):
            hasher.update(content.read(start, start + (1 << 24)))
        self.digest = f"{hasher.hexdigest()} {text_key}"
        try:
            self._parquet = pyarrow.parquet.ParquetFile(
                content.path, page_checksum_verification=True
            )
            columns = list(self._parquet.schema_arrow.names)
            meta = self._parquet.metadata
            rows = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
            if sum(rows) != meta.num_rows:
                raise ValueError("its footer tells of two numbers of rows")
        except Exception as error:  # the library has errors of many kinds for damaged files
            raise ConfigError(
                f"data.path: {content.name} is not a Parquet file that can be read "
                f"({reason(error)}); it looks like {looks_like(content.head)}"
            ) from error
        if text_key not in columns:
            raise ConfigError(
                f"{content.name} has no column data.text_key={one_line(text_key)!r}; it has "
                f"{one_line(', '.join(columns))}: set data.text_key to the column that holds the "
                "text"
            )
        self._starts = [0, *itertools.accumulate(rows)]
        self._group = functools.lru_cache(maxsize=1)(self._read_group)

    def _read_group(self, group: int) -> Any:
        self._content.read(0, 0)  # the file is still the one that was hashed
        column = self._parquet.read_row_group(group, columns=[self._key]).column(0)
        if len(column) != self._starts[group + 1] - self._starts[group]:
            raise ValueError("its footer tells of another number of rows")
        return column

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> str:
        group = bisect.bisect_right(self._starts, index) - 1
        where = f"{self._content.name} row {index + 1}"
        try:
            value = self._group(group)[index - self._starts[group]].as_py()
        except ConfigError:
            raise
        except Exception as error:  # damaged pages, text that is not UTF-8
            raise ConfigError(
                f"data.path: {where} cannot be read ({reason(error)}); write the file again, or "
                "set data.path to other files"
            ) from error
        return _as_text(value, where, self._key)


def text_of(row: Any, where: str, key: str) -> str:
    """Text of a JSON row.

    Raises:
      ConfigError: No object, no field `key`, or no text in it.
    """
    if not isinstance(row, dict) or key not in row:
        names = one_line(", ".join(map(repr, row)), 120) if isinstance(row, dict) else ""
        raise ConfigError(
            f"{where} has no field data.text_key={one_line(key)!r}; it has "
            f"{f'keys {names}' if isinstance(row, dict) else 'no keys'}: set data.text_key to the "
            "field that holds the text"
        )
    return _as_text(row[key], where, key)


def _as_text(value: Any, where: str, key: str) -> str:
    """Text of a field; null is an empty document."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: data.text_key={one_line(key)!r} holds {type(value).__name__}, not text; set "
            "data.text_key to a field with text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: data.text_key={one_line(key)!r} has half a surrogate pair at character "
            f"{error.start}, which is not text; repair the row or set data.path to another file"
        ) from error
    return value
