"""Starts of a run, counted in its workdir: a run that dies again and again is stopped.

Launch scripts start a run again after a lost process or a hang. Where the cause stays, that would
go on for ever, each time from the same checkpoint. So process 0 counts the starts in a row that
ended badly and made no new checkpoint, in `progress/restarts.json`, and refuses to begin another
one past `checkpoint.restarts`.
"""

import contextlib
import dataclasses
import json
import time
from pathlib import Path

from deepseek_jax.config import ConfigError
from deepseek_jax.errors import reason
from deepseek_jax.runtime import progress

NAME = "restarts.json"


@dataclasses.dataclass(frozen=True)
class Start:
    """A start of a run, as the file holds it.

    Attributes:
      attempt: number of the start, from 0.
      step: newest checkpoint at the start; 0 without one.
      without_progress: starts in a row, before this one, that made no new checkpoint.
      time: Unix seconds of the last write.
      code: exit code of process 0; None while it runs, and where it was killed.
      reason: line with which it ended.
    """

    attempt: int
    step: int
    without_progress: int
    time: float
    code: int | None = None
    reason: str = ""


def begin(workdir: Path, step: int, most: int) -> Start:
    """Counts a start; for process 0, which has the workdir's lock.

    Args:
      step: the newest checkpoint; 0 without one.
      most: starts in a row that may fail without a new checkpoint; 0 for any number.

    Raises:
      ConfigError: there were more; the code of this error stops launch scripts.
    """
    before = last(workdir)
    start = Start(0, step, 0, time.time())
    if before is not None:
        failed = before.code != 0 and before.step == step
        start = dataclasses.replace(
            start,
            attempt=before.attempt + 1,
            without_progress=before.without_progress + 1 if failed else 0,
        )
        if most and start.without_progress > most:
            raise ConfigError(
                f"--workdir={workdir}: {start.without_progress} starts in a row ended without a "
                f"new checkpoint after step {step}, and checkpoint.restarts={most}. The last one: "
                f"{_why(workdir, before)}. The folders progress, stacks and logs there tell more. "
                "Mend the cause and start once with --config.checkpoint.restarts=0"
            )
    try:
        _write(workdir, start)
    except OSError as error:
        folder = workdir / progress.FOLDER
        raise ConfigError(
            f"--workdir={workdir}: {folder} cannot be written ({reason(error)}); make it a folder "
            "that can be written, with room, or remove it"
        ) from error
    return start


def ended(workdir: Path, start: Start, code: int, reason: str) -> None:
    """Notes how a start ended; 0 for an end that needs no cure, a signal for example."""
    with contextlib.suppress(OSError):
        _write(workdir, dataclasses.replace(start, time=time.time(), code=code, reason=reason))


def forget(workdir: Path, before: Start | None) -> None:
    """Takes back what a start has written, where bad input has ended it.

    Args:
      before: the start before, of `last`; None without one.
    """
    folder = workdir / progress.FOLDER
    if before is not None:
        with contextlib.suppress(OSError):
            _write(workdir, before)
        return
    for path in [*folder.glob("process_*.json"), folder / NAME]:
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def last(workdir: Path) -> Start | None:
    """The last start that was counted in a workdir; None without one, or where it is damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = Start(**json.loads((workdir / progress.FOLDER / NAME).read_text()))
        counts = found.attempt, found.step, found.without_progress
        if all(type(count) is int for count in counts):
            return dataclasses.replace(found, reason=str(found.reason))
    return None


def _write(workdir: Path, start: Start) -> None:
    folder = workdir / progress.FOLDER
    folder.mkdir(exist_ok=True)
    progress.replace(folder / NAME, dataclasses.asdict(start))


def _why(workdir: Path, before: Start) -> str:
    """The line with which the last start ended, of process 0 or another one."""
    if before.reason:
        return before.reason
    for path in sorted((workdir / progress.FOLDER).glob("process_*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            told = progress.ProcessProgress(**json.loads(path.read_text()))
            if told.attempt == before.attempt and told.reason:
                return told.reason
    return "process 0 was killed, or its host was lost, and no other process said why"
