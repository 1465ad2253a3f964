"""Frame of a run that survives: its progress is shown, hangs are ended, restarts are counted."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import jax

from deepseek_jax.config import Config, ConfigError
from deepseek_jax.errors import AGAIN, LostPeer, reason
from deepseek_jax.runtime import (
    joining,
    native_output,
    processes,
    progress,
    restarts,
    signals,
    watchdog,
)
from deepseek_jax.runtime.agreement import from_primary, raise_together


@contextlib.contextmanager
def watched(config: Config, workdir: Path) -> Iterator[None]:
    """Watches a run from its start on, before it has the workdir; see `watchdog`."""
    progress.begin(jax.process_index(), jax.process_count()).enter("start")
    with watchdog.watching(config.deadlines, workdir), naming_the_lost():
        yield


@contextlib.contextmanager
def surviving(config: Config, workdir: Path, checkpoints: Path) -> Iterator[None]:
    """Frames a run in a workdir that it has to itself; for all processes.

    Args:
      checkpoints: folder of the checkpoints.

    Raises:
      ConfigError: too many starts in a row have failed; in all processes.
    """
    mine = progress.current

    def counted() -> restarts.Start | None:
        if not processes.is_primary():
            return None
        return restarts.begin(workdir, _newest(checkpoints), config.checkpoint.restarts)

    before = restarts.last(workdir) if processes.is_primary() else None
    start = raise_together(counted)
    mine.attach(workdir, from_primary(start.attempt if start else 0))
    native_output.keep(workdir, mine.now.process)
    code, why = 0, ""
    try:
        with naming_the_lost():
            yield
            mine.enter("end")
            joining.wait_for_all()
    except (signals.Stopped, KeyboardInterrupt):
        code, why = signals.code(), signals.told(signals.heard() or signal.SIGINT)
        raise
    except LostPeer as error:
        code, why = AGAIN, str(error)
        raise
    except ConfigError as error:
        code, why = 2, reason(error)
        raise
    except BaseException as error:
        code, why = 1, reason(error)
        raise
    finally:
        mine.ended(code, why)
        mine.close()
        if start and code == 2:
            restarts.forget(workdir, before)
        elif start:
            restarts.ended(workdir, start, _counted(code, why), why)


def _counted(code: int, why: str) -> int:
    """The code that counts against restarts: 0 for a user's own signal.

    SIGTERM counts: launch scripts send it to the others where one process has failed.
    """
    by_hand = why in {signals.told(signal.SIGINT), signals.told(signal.SIGHUP)}
    by_script = why == signals.told(signal.SIGTERM)
    return 0 if by_hand else code or (143 if by_script else 0)


def _newest(checkpoints: Path) -> int:
    """The newest checkpoint, whether it can be read or not; 0 without one."""
    return max((int(p.name) for p in checkpoints.glob("*") if p.name.isdecimal()), default=0)


@contextlib.contextmanager
def naming_the_lost() -> Iterator[None]:
    """Turns the error of a collective whose other end is gone into `LostPeer`, which names it.

    A ConfigError stays one, though it may hold the words of such an error: those of the last start.
    """
    try:
        yield
    except (LostPeer, ConfigError):
        raise
    except Exception as error:
        if line := joining.lost(reason(error) + str(error)):
            raise LostPeer(line) from error
        raise
