"""Memory that this machine has for a process: of the host, and of an accelerator."""

from collections.abc import Iterator
from pathlib import Path

import jax

_CGROUP_MOUNT = Path("/sys/fs/cgroup")


def host_bytes() -> int | None:
    """Bytes of host memory with swap, within the limits of this process's control groups.

    None where the system does not tell (other than Linux).
    """
    try:
        sizes = _meminfo(Path("/proc/meminfo").read_text())
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return None
    if "MemTotal" not in sizes:
        return None
    swap = sizes.get("SwapTotal", 0)
    return min(sizes["MemTotal"] + swap, *(limit + swap for limit in _limits(groups)), 2**63)


def device_bytes() -> int | None:
    """Bytes that JAX may use of one local accelerator; None for a CPU, or where JAX cannot tell."""
    device = jax.local_devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def _meminfo(text: str) -> dict[str, int]:
    """Bytes by name, from lines such as "MemTotal:  1024 kB"."""
    rows = [line.split() for line in text.splitlines()]
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3}


def _limits(groups: str, mount: Path = _CGROUP_MOUNT) -> Iterator[int]:
    """Memory limits of the control groups in /proc/self/cgroup and of those around them.

    Version 2 has one line "0::/path"; version 1 has one for each controller, "4:memory:/path". In a
    container the path may be that of the host, and the mounted root is then the container's group.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = mount / controllers
        file = "memory.limit_in_bytes" if controllers else "memory.max"
        inside = root / path.lstrip("/")
        for folder in (inside, *inside.parents):
            text = _read(folder / file)
            if text.isdigit():  # version 2 says "max" for no limit, version 1 a huge number
                yield int(text)
            if folder == root:
                break


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def text(count: int) -> str:
    """A number of bytes with a binary unit, such as "23.4 GiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = min(max(count.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{count / 1024**power:.3g} {units[power]}" if power else f"{count} B"
