"""A file that grows by whole pieces, whatever happens to the disk."""

import contextlib
import os
from pathlib import Path


class AppendedFile:
    """A file to append to; a piece that cannot be written whole leaves nothing of itself behind.

    Each piece is in the file once `append` returns. After an error the next piece is tried anew.
    """

    def __init__(self, path: Path, *, create: bool = False):
        """Opens nothing yet.

        Args:
          create: whether the first `append` makes the file.
        """
        self._path, self._create = path, create
        self._file: int | None = None
        self._size: int | None = None  # bytes of whole pieces

    def append(self, piece: bytes) -> None:
        """Appends a piece; OSError if it cannot be written, or if the file was removed."""
        try:
            self._append(piece)
        except OSError:
            if self._file is not None and self._size is not None:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)
            self.close()
            raise

    def close(self) -> None:
        """Closes the file; may be called twice."""
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                os.close(file)

    def _append(self, piece: bytes) -> None:
        there = None if self._size is None else os.stat(self._path)
        replaced = there and self._file and not os.path.samestat(os.fstat(self._file), there)
        if there and replaced:
            self.close()
            self._size = there.st_size
        if self._file is None:
            self._file = self._open()
        left = memoryview(piece)
        while left:
            left = left[os.write(self._file, left) :]
        assert self._size is not None
        self._size += len(piece)

    def _open(self) -> int:
        make = os.O_CREAT if self._create and self._size is None else 0
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | make, 0o666)
        size = os.fstat(file).st_size
        if self._size is None or size < self._size:
            self._size = size
        elif size > self._size:
            os.ftruncate(file, self._size)  # it could not be cut when it failed
        return file
