"""Kind of this machine's CPU, from /proc/cpuinfo."""

import contextlib

# Lines that tell one kind of CPU from another, on x86 and on Arm.
_NAMES = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features",
          "CPU implementer", "CPU architecture", "CPU variant", "CPU part")  # fmt: skip


def lines() -> list[str]:
    """Lines on the kind of the first CPU; none where the system has no such file."""
    found = []
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as stream:
        for line in stream:
            if not line.strip():
                break
            if line.partition(":")[0].strip() in _NAMES:
                found.append(line)
    return found


def has(instructions: str) -> bool:
    """Whether the CPU has a set of instructions, by its name in /proc/cpuinfo, as "avx512f"."""
    return any(
        instructions in line.partition(":")[2].split()
        for line in lines()
        if line.startswith(("flags", "Features"))
    )
