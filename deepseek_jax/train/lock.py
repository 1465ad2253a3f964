"""Lock on a workdir: one live run in each, and a sign whether the folder is still this run's.

Process 0 holds `WORKDIR/.lock` by `flock` for the life of the run; the kernel releases it when the
process ends, however it ends. On a file system without locks the file counts as held while its
holder touches it, every BEAT_SECONDS; after STALE_SECONDS without a touch, or at once where its
process is gone from this host, the next run takes it over. Readers of a workdir need no lock.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_jax.config import ConfigError
from deepseek_jax.errors import RunError, reason
from deepseek_jax.runtime import processes
from deepseek_jax.runtime.agreement import raise_together

NAME = ".lock"
BEAT_SECONDS, STALE_SECONDS = 20.0, 120.0
_TRIES = 100
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def held(directory: Path) -> Iterator["Lock"]:
    """Holds the lock on a workdir, which is made if it does not exist; for all processes.

    At the end the lock goes, and with it every folder that was made for it and is still empty.

    Raises:
      ConfigError: another run has the workdir, or it cannot be written; in all processes.
    """
    lock = Lock(directory)
    try:
        raise_together(lambda: lock.take() if processes.is_primary() else None)
        yield lock
    finally:
        lock.release()


class Lock:
    """The lock of one workdir; on processes that did not take it, `check` and `release` do nothing.

    Attributes:
      directory: the workdir.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._path = directory / NAME
        self._file: int | None = None
        self._text = ""
        self._made: list[Path] = []
        self._end = threading.Event()

    def take(self) -> None:
        """Takes the lock at once, or raises ConfigError with the name of its holder."""
        tries = 0
        while self._file is None:
            try:
                self._make_folders()
                self._file = self._try()
            except OSError as error:
                tries += 1
                # A run that ends with nothing written removes the folders that it made.
                if isinstance(error, FileNotFoundError) and tries < _TRIES:
                    continue
                raise ConfigError(
                    f"--workdir={self.directory} cannot be written ({reason(error)}); "
                    "give another folder"
                ) from error

    def check(self) -> None:
        """Raises RunError where the workdir was removed, renamed or replaced since `take`."""
        if self._file is None:
            return
        try:
            found = self._path.read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            found = ""
        except OSError:  # says nothing about whose folder it is
            return
        if found != self._text:
            what = "belongs to another run now" if found else "was removed, renamed or replaced"
            raise RunError(
                f"--workdir={self.directory} {what} while this run went on, so it stops and writes "
                "nothing more. Give the folder's new path as --workdir to go on from its newest "
                "checkpoint, or start again"
            )

    def release(self) -> None:
        """Releases the lock; may be called twice."""
        self._end.set()
        ours = self._file is None
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                ours = self._path.read_text(errors="replace") == self._text
                if ours:
                    self._path.unlink()  # while the lock is held: later it may be another's
            os.close(file)
        made, self._made = self._made, []
        for folder in reversed(made if ours else []):
            with contextlib.suppress(OSError):  # it holds a run now
                folder.rmdir()

    def _make_folders(self) -> None:
        paths = (self.directory, *self.directory.absolute().parents)
        nearest = next(path for path in paths if os.path.lexists(path))
        if not nearest.is_dir():
            raise ConfigError(
                f"--workdir={self.directory}: {nearest} is no folder; give another one"
            )
        for folder in reversed((self.directory, *self.directory.parents)):
            if not folder.is_dir():
                folder.mkdir(exist_ok=True)
                self._made.append(folder)

    def _try(self) -> int | None:
        """The locked file; None where its holder removed it between opening and locking."""
        # NFS locks writable files only, and a link may lead to a file of another purpose.
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise self._in_use(_holder(file)) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self._take_over(file)
                return file
            if self._is(file):
                self._sign(file)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        return None

    def _is(self, file: int) -> bool:
        """Whether an open file is the one of the workdir."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file), self._path.stat())
        return False

    def _sign(self, file: int) -> None:
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
        self._text = json.dumps({**me, "id": os.urandom(8).hex()}) + "\n"
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, self._text.encode(), 0)
        except OSError:  # a full disk
            self._path.unlink()
            raise

    def _take_over(self, file: int) -> None:
        """Takes the lock of a file system without locks; ConfigError if its holder is alive."""
        holder = _holder(file)
        if holder and not _gone(holder):
            with tempfile.TemporaryFile(dir=self.directory) as new:  # the file system's own clock
                age = os.fstat(new.fileno()).st_mtime - os.fstat(file).st_mtime
            if age < STALE_SECONDS:
                raise self._in_use(holder)
        self._sign(file)
        time.sleep(1)  # another run that takes it over at the same time signs it, too
        if self._path.read_text(errors="replace") != self._text:
            raise self._in_use(_holder(file))
        threading.Thread(target=self._beat, args=(file,), daemon=True).start()

    def _beat(self, file: int) -> None:
        while not self._end.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(file)

    def _in_use(self, holder: dict[str, Any]) -> ConfigError:
        who = "another process"
        if holder:
            who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        return ConfigError(
            f"--workdir={self.directory} is in use by {who}; wait for that run or stop it, or give "
            "another --workdir"
        )


def _holder(file: int) -> dict[str, Any]:
    """Who signed a lock; empty where nobody has yet."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(os.pread(file, 4096, 0))
        if isinstance(found, dict) and found.keys() >= {"host", "pid", "since"}:
            return found
    return {}


def _gone(holder: dict[str, Any]) -> bool:
    """Whether a holder was a process of this host that has ended."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        pass
    return False
