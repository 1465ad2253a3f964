"""The process that a run waits for, named from the files of `progress`."""

import os
import socket
import time
from collections.abc import Callable

from deepseek_jax.errors import AGAIN
from deepseek_jax.runtime import progress
from deepseek_jax.runtime.progress import SECTIONS, ProcessProgress, Seen

_MOST_NAMED = 3
_PATIENCE = 25.0  # seconds in which a process that was lost falls silent
_READ_SECONDS = 10.0  # that a file system has for all files


def lost(patience: float = _PATIENCE) -> str:
    """Names the process that is gone, after a collective or the coordinator has failed.

    Waits up to `patience` seconds for evidence, since a process shows nothing at the moment of its
    end; "" without any.
    """
    mine = progress.current
    patience = max(patience, 4 * progress.interval(mine.now.processes)) if patience else 0.0
    until = time.monotonic() + patience
    while True:
        named = _named(_failed)
        if named or time.monotonic() >= until or mine.folder is None:
            return named or _named(_told_by_others)
        time.sleep(0.5)


def behind() -> str:
    """Names the process for which the others wait, after a deadline; "" where none is behind."""
    return _named(_failed) or _named(_slowest) or _named(_told_by_others)


def _named(judge: Callable[[ProcessProgress, dict[int, Seen]], list[str]]) -> str:
    mine = progress.current
    folder = mine.folder
    if folder is None:
        return ""
    found = progress.within(_READ_SECONDS, lambda: progress.read(folder, mine.now))
    return _listed(judge(mine.now, found)) if found else ""


def _listed(named: list[str]) -> str:
    more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
    return "; ".join(named[:_MOST_NAMED]) + more


def _failed(own: ProcessProgress, found: dict[int, Seen]) -> list[str]:
    """Processes that never wrote, have ended, are gone from this host, or are silent."""
    named = []
    alive = progress.interval(own.processes) * 3 + 2
    for number in range(own.processes):
        if number == own.process:
            continue
        seen = found.get(number)
        if seen is None:
            named.append(f"process {number} has not shown itself in this attempt")
            continue
        told = seen.progress
        where = f"process {number} (pid {told.pid} on {told.host}"
        at = f"it last showed section {told.section}, step {told.step}"
        if told.code is not None:
            if told.code != AGAIN:
                why = f": {told.reason}" if told.reason else ""
                named.append(f"{where}) ended, exit code {told.code}{why}")
        elif seen.silent > 2 and told.host == socket.gethostname() and _is_gone(told.pid):
            named.append(f"{where}) is gone; {at}")
        elif seen.silent > alive:
            named.append(f"{where}) has shown no sign of life for {seen.silent:.0f} s; {at}")
    return named


def _slowest(own: ProcessProgress, found: dict[int, Seen]) -> list[str]:
    """Processes that live and are behind this one."""
    late = [
        seen.progress
        for number, seen in found.items()
        if number != own.process and seen.progress.code is None
        and _position(seen.progress) < _position(own)
    ]  # fmt: skip
    least = min(map(_position, late), default=None)
    return [
        f"process {told.process} (pid {told.pid} on {told.host}) lives and is behind, in section "
        f"{told.section}, step {told.step}, for {time.time() - told.time:.0f} s"
        for told in late
        if _position(told) == least
    ]


def _told_by_others(own: ProcessProgress, found: dict[int, Seen]) -> list[str]:
    """Line of a process that ended before this one because it waited, perhaps for this one."""
    mine = f"process {own.process} (pid {own.pid} "
    for number, seen in found.items():
        why = seen.progress.reason.removeprefix(f"process {number}: ")
        if number != own.process and seen.progress.code == AGAIN and why:
            ended = "waited for this one and ended" if mine in why else "ended before this one"
            return [f"process {number} {ended}: {why}"]
    return []


def _position(told: ProcessProgress) -> tuple[int, int, int]:
    """Order in which processes pass: phases of a run, steps, and sections of one step."""
    rank = SECTIONS.index(told.section)
    first, last = SECTIONS.index("save"), SECTIONS.index("step")
    if first <= rank <= last:
        return first, told.step, rank
    return rank, 0, 0


def _is_gone(pid: int) -> bool:
    """Whether no process of this host has this number; another's container may hide it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether the process has ended, and its parent has not asked for its exit code yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except (OSError, IndexError):
        return False
