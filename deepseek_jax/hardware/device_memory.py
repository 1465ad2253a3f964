"""Memory of a device, to refuse sizes that it cannot hold before they are allocated."""

import os
from pathlib import Path
from typing import Any

_CGROUP = Path("/sys/fs/cgroup/memory.max")  # a container's limit: bytes, or "max"


def bytes_of(device: Any) -> int | None:
    """Bytes that this process may use on a JAX device; None where the backend does not say.

    On a CPU it is the memory of the machine, or of the container.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(_CGROUP.read_text()))
    except (OSError, ValueError):
        return machine
