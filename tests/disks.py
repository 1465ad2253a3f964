"""Disks that are full for a while."""

import contextlib
import errno
import os
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def full(name: str, room: int = 0) -> Iterator[None]:
    """Files whose path contains `name` take so many bytes more, and then none."""
    write, left = os.write, [room]

    def written(file: int, data) -> int:
        if name not in os.readlink(f"/proc/self/fd/{file}"):
            return write(file, data)
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = bytes(data)[: left[0]]
        left[0] -= len(part)
        return write(file, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", written)
        yield
