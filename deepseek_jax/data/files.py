"""Files that a user names, found, opened and shown without surprises; files replaced as a whole.

Only regular files are opened, and without waiting, so that a pipe or a device never blocks. A file
that changes after it was opened first is an error, since its documents are read more than once.
"""

import bz2
import contextlib
import gzip
import lzma
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import one_line
from deepseek_jax.errors import reason

HEAD = 1 << 16  # bytes that tell what a file is
_PART = 1 << 20  # bytes unpacked at once


def resolve(key: str, value: str) -> Path:
    """Path of a config value, with `~` replaced.

    Raises:
      ConfigError: A home folder that does not exist, or a value that cannot be a path.
    """
    try:
        path = Path(value).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)
    except RuntimeError as error:
        raise ConfigError(
            f"{key}={one_line(value)!r} names a home folder that is unknown; write the path in full"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}={one_line(value)!r} is no path that can be opened ({reason(error)}); set {key} "
            "to another one"
        ) from error
    return path


def open_regular(path: Path, *, follow: bool = True) -> int:
    """Descriptor of a regular file, open for reading; the caller closes it.

    Args:
      path: The file.
      follow: False refuses a link.

    Raises:
      OSError: No such file, no permission, or something that is no regular file.
    """
    link = 0 if follow else os.O_NOFOLLOW
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | link)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is not a regular file")
    return descriptor


def read_all(path: Path, most: int) -> bytes:
    """Content of a regular file of at most `most` bytes.

    Raises:
      OSError: A file that cannot be read, or a longer one.
    """
    with os.fdopen(open_regular(path), "rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise OSError(0, f"it has more than {most:,} bytes")
    return data


def replace(path: Path, content: bytes | str) -> None:
    """Writes a whole file, so that a reader finds either the old one or the new one.

    A link at `path` is replaced, and what it leads to stays as it is.

    Raises:
      OSError: The file cannot be written; the old one is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process, or a link that somebody left
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


class Content:
    """Bytes of a file; those of a compressed one are unpacked into an unnamed temporary file.

    Attributes:
      path: The file.
      name: Its path in messages.
      size: Number of bytes.
      head: The first ones.
      packed: Name of the compression, or "".
    """

    def __init__(self, path: Path):
        self.path, self.name = path, one_line(path)
        self._plain: BinaryIO | None = None
        with self._reading(), os.fdopen(open_regular(path), "rb") as stream:
            self._identity = _identity(stream.fileno())
            self.size = self._identity[2]
            self.head = stream.read(HEAD)
            self.packed = compression(self.head)

    def unpack(self, check: Callable[[], None]) -> None:
        """Makes the unpacked bytes the content of a compressed file.

        Args:
          check: Raises an error if the first bytes, which are `head` then, are not wanted.
        """
        plain: Any = tempfile.TemporaryFile()  # noqa: SIM115
        with self._reading(), os.fdopen(open_regular(self.path), "rb") as stream:
            self.head = b""
            for part in _unpacked(self.packed, stream, self.name):
                if not self.head:
                    self.head = part[:HEAD]
                    check()
                try:
                    plain.write(part)
                    plain.flush()
                except OSError as error:
                    raise ConfigError(
                        f"data.path: {self.name} cannot be unpacked into "
                        f"{one_line(tempfile.gettempdir())} ({reason(error)}); unpack it yourself, "
                        "or set TMPDIR to a folder with room"
                    ) from error
        self._plain = plain
        self.size = os.fstat(plain.fileno()).st_size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from `start` to `stop`, or to the end.

        Raises:
          ConfigError: The file is gone, or is another one than at first.
        """
        with self._open() as stream:
            parts = []
            while start < stop and (part := os.pread(stream.fileno(), stop - start, start)):
                parts.append(part)
                start += len(part)
        return b"".join(parts)

    def all(self) -> bytes:
        """All bytes."""
        return self.read(0, self.size)

    def lines(self) -> Iterator[bytes]:
        """Yields the lines, with their ends."""
        with self._open() as stream:
            stream.seek(0)
            yield from iter(stream.readline, b"")  # an iterator that ends leaves the file open

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        with self._reading():
            if self._plain is not None:
                yield self._plain
                return
            with os.fdopen(open_regular(self.path), "rb") as stream:
                if _identity(stream.fileno()) != self._identity:
                    raise OSError(0, "it changed while it was in use")
                yield stream

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"data.path: {self.name} cannot be read: {reason(error)}; repair it, or set "
                "data.path to other files"
            ) from error


def compression(head: bytes) -> str:
    """Name of the compression of a file; "" without."""
    name = next((name for name, magic in _MAGIC.items() if head.startswith(magic)), "")
    if name == "bzip2" and head[4:10] not in (b"1AY&SY", b"\x17rE8P\x90"):
        return ""  # a text that begins with these letters
    return name


def _identity(descriptor: int) -> tuple[int, ...]:
    """Numbers that a file keeps while nobody changes it."""
    now = os.fstat(descriptor)
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns


def _unpacked(packed: str, stream: BinaryIO, name: str) -> Iterator[bytes]:
    """Yields the unpacked bytes of a file."""
    try:
        if packed in _DECOMPRESSORS:
            yield from _streams(_DECOMPRESSORS[packed], stream)
        else:
            unpacker = _unpacker(packed, stream, name)
            yield from iter(lambda: unpacker.read(_PART), b"")
    except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"data.path: {name} is damaged {packed} data ({reason(error)}); copy it again"
        ) from error


def _streams(new: Callable[[], Any], stream: BinaryIO) -> Iterator[bytes]:
    """Yields the unpacked bytes of a file of one or more compressed streams.

    The file classes of `bz2` and `lzma` end without a word at a damaged second stream.
    """
    held, data = b"", stream.read(_PART)
    while data:
        unpacker = new()
        while not unpacker.eof:
            held += unpacker.decompress(data, _PART)
            if len(held) >= _PART:
                yield held
                held = b""
            data = b""
            if unpacker.needs_input and not unpacker.eof:
                data = stream.read(_PART)
                if not data:
                    raise EOFError("it ends too early")
        data = unpacker.unused_data or stream.read(_PART)
        while data and not (data := data.lstrip(b"\0")):  # padding
            data = stream.read(_PART)
    if held:
        yield held


def _unpacker(packed: str, stream: BinaryIO, name: str) -> Any:
    """Stream of the unpacked bytes."""
    if packed == "gzip":
        return gzip.GzipFile(fileobj=stream)
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(
            f"data.path: {name} is Zstandard data, which needs pyarrow: "
            "pip install 'deepseek_jax[parquet]'"
        ) from error
    return pyarrow.input_stream(stream, compression="zstd")


_MAGIC = {
    "gzip": b"\x1f\x8b\x08",
    "bzip2": b"BZh",  # and a digit, and the first block
    "xz": b"\xfd7zXZ\0",
    "Zstandard": b"\x28\xb5\x2f\xfd",
}
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
}


def under(root: Path, skip: Collection[str] = ()) -> tuple[list[Path], list[str]]:
    """Regular files under a folder, sorted, and words on each entry that is left out.

    Hidden ones and folders named in `skip` are neither.

    Raises:
      ConfigError: A folder that cannot be listed.
    """
    found: list[Path] = []
    left_out: list[str] = []

    def refuse(error: OSError) -> None:
        raise ConfigError(
            f"data.path: the folder {one_line(error.filename)} cannot be read: {reason(error)}; "
            "set data.path to another one"
        ) from error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(f for f in folders if f[0] != "." and f not in (*skip, "__pycache__"))
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                left_out.append(f"{one_line(Path(folder, name))} is a link to a folder")
        for name in sorted(names):
            if name[0] == ".":
                continue
            path = Path(folder, name)
            try:
                kind = path.stat().st_mode
            except OSError as error:
                left_out.append(f"{one_line(path)} cannot be found: {reason(error)}")
                continue
            if stat.S_ISREG(kind):
                found.append(path)
            else:
                left_out.append(f"{one_line(path)} is neither a file nor a folder")
    return found, left_out
