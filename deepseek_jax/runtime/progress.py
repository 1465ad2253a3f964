"""Progress of each process of a run, published without a collective, so that a hang has a name.

Each process writes one JSON object to `WORKDIR/progress/process_N.json`, by an atomic rename: when
its section changes, and else every few seconds (`interval`) as long as it lives. A thread writes
it, so that a slow file system holds up no step. Its keys:

| key | value |
| --- | --- |
| process, processes | number of this process from 0, and how many there are |
| host, pid | where it runs |
| attempt | number of this start of the run in this workdir, from 0 |
| section | join, start, compile, first_step, step, save, evaluation, end; ended |
| step | the last step that was dispatched, since the start of the run |
| time | Unix seconds at which section or step last changed |
| median_step_seconds | of the steps of this process; null before it is known |
| beat | Unix seconds of this write; a process that writes no more hangs or is gone |
| code, reason | of a process that ended by itself: exit code and line; else null and "" |

Process 0 also writes `WORKDIR/progress/restarts.json` at each start, with the keys attempt, step
(newest checkpoint at this start), without_progress (starts in a row, before this one, that made no
new checkpoint), time, code and reason (of the end; null and "" while the run goes on).
"""

import contextlib
import dataclasses
import json
import os
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = "progress"

# In the order in which a run meets them; `save` comes between steps.
SECTIONS = ("join", "start", "compile", "first_step", "save", "step", "evaluation", "end", "ended")

_PATIENCE = 5.0  # seconds
_KEPT_STEPS = 100  # whose durations have their median taken


@dataclasses.dataclass(frozen=True)
class ProcessProgress:
    """Progress of one process, as its file holds it; the module describes the fields."""

    process: int
    processes: int
    host: str
    pid: int
    attempt: int
    section: str
    step: int
    time: float
    median_step_seconds: float | None
    beat: float
    code: int | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Seen:
    """Progress of a process as another one found it.

    Attributes:
      silent: seconds since its last write, by the clock of the file system; longer where that clock
        was set since then.
    """

    progress: ProcessProgress
    silent: float


def interval(processes: int) -> float:
    """Seconds between two writes of a process: all of a run together write 100 files a second."""
    return max(1.0, processes / 100)


class Publisher:
    """Progress of this process, kept in memory and, once there is a workdir, in its file."""

    def __init__(self, process: int = 0, processes: int = 1):
        """Begins in `join`, without a file."""
        now = time.time()
        self._now = ProcessProgress(
            process, processes, socket.gethostname(), os.getpid(), 0, "join", 0, now, None, now,
            None, "",
        )  # fmt: skip
        self._changed = time.monotonic()
        self._lock = threading.Lock()
        self._durations: deque[float] = deque(maxlen=_KEPT_STEPS)
        self._last_step: float | None = None  # when the step before was done
        self._waits = threading.Event()  # set where the file is behind
        self._folder: Path | None = None
        self._thread: threading.Thread | None = None
        self._end = threading.Event()

    @property
    def now(self) -> ProcessProgress:
        """Progress of this moment."""
        return self._now

    @property
    def seconds(self) -> float:
        """Seconds since section or step last changed."""
        return time.monotonic() - self._changed

    def leave_out(self, seconds: float) -> None:
        """Takes time in which the whole process was stopped out of `seconds`."""
        with self._lock:
            self._changed = min(self._changed + seconds, time.monotonic())

    @property
    def folder(self) -> Path | None:
        """Folder of the files; None before `attach` and after `close`."""
        return self._folder

    def enter(self, section: str) -> str:
        """Begins a section; returns the one before."""
        with self._lock:
            before = self._now.section
            if section != before:
                self._change(section=section)
        self._waits.set()
        return before

    @contextlib.contextmanager
    def inside(self, section: str) -> Any:
        """Marks a section inside another one, to which it returns without an error."""
        before = self.enter(section)
        yield
        self.enter(before)

    def dispatched(self, step: int) -> None:
        """Notes the dispatch of a step, which is the first one until a step is `done`."""
        with self._lock:
            self._change(section="step" if self._last_step else "first_step", step=step)

    def done(self) -> None:
        """Notes that a step has ended."""
        with self._lock:
            now = time.monotonic()
            if self._last_step is not None:
                self._durations.append(now - self._last_step)
            section = "step" if self._now.section == "first_step" else self._now.section
            median = statistics.median(self._durations) if self._durations else None
            self._last_step = now
            self._change(section=section, median_step_seconds=median)

    def attach(self, workdir: Path, attempt: int) -> None:
        """Writes the file from now on."""
        with self._lock:
            self._now = dataclasses.replace(self._now, attempt=attempt)
        self._folder = workdir / FOLDER
        self._end.clear()
        with contextlib.suppress(OSError):
            self.write()
        self._thread = threading.Thread(target=self._publish, daemon=True, name="progress")
        self._thread.start()

    def ended(self, code: int, reason: str = "") -> None:
        """Says that this process ends by itself; the file is written before this returns."""
        with self._lock:
            # A process that fails leaves the section in which it failed.
            section = self._now.section if code else "ended"
            self._change(section=section, code=code, reason=reason)
        with contextlib.suppress(OSError):
            self.write()

    def close(self) -> None:
        """Stops writing; waits for a write that has begun, unless its file system hangs."""
        self._end.set()
        self._waits.set()
        self._folder = None
        if self._thread:
            self._thread.join(timeout=_PATIENCE)

    def write(self) -> None:
        """Writes the file; raises OSError where it cannot be written."""
        folder = self._folder
        if folder is None:
            return
        folder.mkdir(exist_ok=True)
        with self._lock:
            self._now = dataclasses.replace(self._now, beat=time.time())
            told = self._now
        replace(folder / f"process_{told.process}.json", dataclasses.asdict(told))

    def _change(self, **values: Any) -> None:
        self._now = dataclasses.replace(self._now, time=time.time(), **values)
        self._changed = time.monotonic()

    def _publish(self) -> None:
        """Writes in a thread of its own: a new section soon, everything else at the interval."""
        pause = interval(self._now.processes)
        while not self._end.is_set():
            self._waits.clear()
            with contextlib.suppress(OSError):
                self.write()
            self._waits.wait(pause)
            self._end.wait(0.1)  # sections that change quickly are written together


current = Publisher()


def begin(process: int, processes: int) -> Publisher:
    """Makes a new `current`, before this process joins its run."""
    global current
    current.close()
    current = Publisher(process, processes)
    return current


def replace(path: Path, values: dict[str, Any]) -> None:
    """Writes a small JSON file by one rename, without a flush: it is of use while it is new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_text(json.dumps(values) + "\n")
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read(folder: Path, own: ProcessProgress) -> dict[int, Seen]:
    """Progress of the processes of this attempt that have written, by number.

    Ages are differences of the times at which files were written, by the file system's clock:
    clocks of hosts differ. They count from the reader's own file, which it writes first: the newest
    may be that of a process that has hung since before the clock was set back.
    """
    wrote = False
    with contextlib.suppress(OSError):
        current.write()
        wrote = True
    found: dict[int, tuple[ProcessProgress, float]] = {}
    for number in range(own.processes):
        with contextlib.suppress(OSError, ValueError, TypeError):
            with (folder / f"process_{number}.json").open() as file:
                written = os.fstat(file.fileno()).st_mtime
                told = ProcessProgress(**json.load(file))
            if told.attempt == own.attempt:
                found[number] = told, written
    now = max((written for _, written in found.values()), default=0.0)
    if wrote and own.process in found:
        _, now = found[own.process]
    return {number: Seen(told, abs(now - written)) for number, (told, written) in found.items()}


def within(seconds: float, act: Callable[[], Any]) -> Any:
    """The result of `act`, or None where it fails or takes longer, on a file system that hangs."""
    from deepseek_jax.runtime.background import in_background

    try:
        return in_background(act, "reading progress").result(timeout=seconds)
    except Exception:
        return None
