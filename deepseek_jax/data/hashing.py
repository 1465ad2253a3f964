"""Hash of the bytes of large files: blocks are hashed in parallel, then their hashes together.

The result does not depend on the number of threads. SHA-256 is fast where the processor has
instructions for it; hashlib works outside Python's global lock.
"""

import concurrent.futures
import hashlib
import os

_BLOCK = 1 << 23  # bytes


def of_file(descriptor: int, start: int = 0) -> str:
    """Hash of an open file from byte `start` to its end.

    Raises:
      OSError: A file that cannot be read, or became shorter on the way.
    """
    size = os.fstat(descriptor).st_size

    def block(offset: int) -> bytes:
        hasher, left = hashlib.sha256(), min(_BLOCK, size - offset)
        while left:
            part = os.pread(descriptor, left, offset)
            if not part:
                raise OSError(0, "it became shorter while it was read")
            hasher.update(part)
            offset, left = offset + len(part), left - len(part)
        return hasher.digest()

    whole = hashlib.sha256(f"{size - start} ".encode())
    offsets = range(start, size, _BLOCK)
    if len(offsets) < 2:
        for offset in offsets:
            whole.update(block(offset))
    else:
        threads = min(_cores(), len(offsets), 32)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for part in pool.map(block, offsets):
                whole.update(part)
    return whole.hexdigest()[:32]


def _cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
