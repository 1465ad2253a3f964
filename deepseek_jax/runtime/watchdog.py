"""Watchdog of a process: it ends the process where a section takes longer than its deadline.

A collective that waits for a process that hangs waits for ever, without Python's lock. So a thread
looks at this process's own `progress`: where that stands still past its deadline the thread names
the process behind, from the files of all processes, writes the stacks of all threads into the
workdir, and ends the process with a code at which launch scripts start the run again. It asks
neither the coordinator nor any other process, since each of them may be the one that hangs.

Time in which this whole process stood still, after Ctrl-Z or SIGSTOP, or in a suspended job or a
paused container, does not count against its deadline: the thread has not run in it, either.
"""

import contextlib
import dataclasses
import faulthandler
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from deepseek_jax.config import DeadlineConfig
from deepseek_jax.errors import AGAIN
from deepseek_jax.runtime import leaving, progress, suspects

STACKS = "stacks"

# The deadline of a step that is learnt: this many medians of this process's steps, and no less
# than this many seconds, since a step of milliseconds may wait for a disk.
LEARNT_MEDIANS, LEAST_SECONDS = 10.0, 180.0

_LOOK_SECONDS = 0.5
_STOOD_STILL_SECONDS = 2.0  # without a look, after which the process has been stopped
_TOGETHER_SECONDS = 3.0  # in which the others reach their deadlines, too, before this one is gone
_LONGEST_END_SECONDS = 45.0  # for naming, stacks and the line
_SLACK_SECONDS = 30.0  # after the deadline, until C code ends a process whose Python is locked


def limit(deadlines: DeadlineConfig, now: progress.ProcessProgress) -> float:
    """Seconds that this process may stay in its section and step."""
    if now.section == "step" and not deadlines.step:
        if now.median_step_seconds is None:
            return float(deadlines.first_step)
        return max(LEAST_SECONDS, LEARNT_MEDIANS * now.median_step_seconds)
    known = dataclasses.asdict(deadlines)
    return float(known.get(now.section, known["end"]))


@contextlib.contextmanager
def watching(deadlines: DeadlineConfig, workdir: Path) -> Iterator[None]:
    """Watches this process until the context is left.

    Args:
      workdir: where `STACKS` goes, once something is written there.
    """
    end = threading.Event()
    dog = threading.Thread(
        target=_watch, args=(deadlines, workdir, end), daemon=True, name="watchdog"
    )
    dog.start()
    try:
        yield
    finally:
        end.set()
        _disarm()


def _watch(deadlines: DeadlineConfig, workdir: Path, end: threading.Event) -> None:
    mine, armed, looked = progress.current, 0.0, time.monotonic()
    while not end.wait(_LOOK_SECONDS):
        before, looked = looked, time.monotonic()
        if looked - before > _LOOK_SECONDS + _STOOD_STILL_SECONDS:
            mine.leave_out(looked - before - _LOOK_SECONDS)
        now, spent = mine.now, mine.seconds
        allowed = limit(deadlines, now)
        if spent > allowed:
            _end(now, allowed, workdir)
        if looked - armed > _SLACK_SECONDS / 3:
            armed = looked
            _arm(allowed - spent + _SLACK_SECONDS, now.processes)
    _disarm()


def _arm(seconds: float, processes: int) -> None:
    """Has C code act after a time, unless a thread of Python arms it anew before that.

    Of several processes it ends this one. The clock goes on while a process is stopped, so a lone
    run, which somebody may stop by hand and continue, writes its stacks and is not ended.
    """
    if processes > 1:
        _end_by_signal_in(seconds)
    elif leaving.may_leave():
        faulthandler.dump_traceback_later(seconds, file=2)


def _end_by_signal_in(seconds: float) -> None:
    """Ends this process by SIGALRM, and writes its stacks, even where Python's lock is kept.

    Args:
      seconds: from now on, and no more after the next call.
    """
    if leaving.may_leave():
        faulthandler.register(signal.SIGALRM, file=2, all_threads=True, chain=True)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _disarm() -> None:
    if leaving.may_leave():
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def _end(now: progress.ProcessProgress, allowed: float, workdir: Path) -> None:
    """Says who is behind, writes the stacks, and ends this process if it is a command."""
    _end_by_signal_in(_LONGEST_END_SECONDS)
    own = f"section {now.section}, step {now.step}, took more than {allowed:.0f} s"
    stacks = progress.within(10, lambda: _dump(workdir, now)) or "nowhere"
    named = suspects.behind() if now.processes > 1 else ""
    if now.processes > 1 and not named:
        named = "every other process lives and is as far: a collective or a device hangs"
    named = f"{named}. " if named else ""
    line = f"process {now.process}: {own} (deadlines.{now.section}). {named}Stacks: {stacks}"
    if not leaving.may_leave():
        leaving.warn(line)
        progress.current.enter(now.section)
        time.sleep(allowed)
        return
    leaving.end(AGAIN, f"error: {line}", wait=_TOGETHER_SECONDS if now.processes > 1 else 0.0)


def _dump(workdir: Path, now: progress.ProcessProgress) -> str:
    """Writes the stacks of all threads; the path of the file."""
    with _stack_file(workdir, f"process_{now.process}_attempt_{now.attempt}.txt") as file:
        file.write(f"section {now.section}, step {now.step}, {time.ctime()}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        return file.name


def _stack_file(workdir: Path, name: str) -> TextIO:
    """An open file in the workdir, else in the folder for temporary files."""
    if workdir.is_dir():
        with contextlib.suppress(OSError):
            (workdir / STACKS).mkdir(exist_ok=True)
            return (workdir / STACKS / name).open("a")
    return Path(tempfile.gettempdir(), f"deepseek_jax_{os.getpid()}_{name}").open("a")
