"""A folder that appears whole: it is filled in a hidden folder on the same disk, then put in place.

An absent target is filled beside its place and appears by one rename. An existing empty target
(an ordinary folder, a mount point, the working directory, what a link leads to) is filled inside,
so that nothing goes to another disk, and its files move up at the end, `config.json` last.

Nothing is written through a link, or into a folder of another user.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from deepseek_jax.config import ConfigError
from deepseek_jax.errors import reason

_INSIDE = ".converting"  # in an existing target; of an absent one `.NAME.converting`, beside it
_NOTHING = {_INSIDE, "lost+found"}  # what an empty target may hold; the latter is a file system's
_MARGIN = 1 << 20  # bytes for what is not counted: directories, indices, the ends of blocks


def check_target(target: Path) -> None:
    """Raises ConfigError unless the target is absent or an empty folder."""
    try:
        empty = not os.path.lexists(target) or {path.name for path in target.iterdir()} <= _NOTHING
    except NotADirectoryError:
        empty = False
    except OSError as error:
        raise ConfigError(f"target={target} cannot be written ({reason(error)})") from error
    if not empty:
        raise ConfigError(f"target={target} exists and is not an empty folder; give another one")


def check_space(folder: Path, target: Path, needed: int) -> None:
    """Raises ConfigError where the folder's disk has no room for so many bytes."""
    disk = shutil.disk_usage(folder)
    needed += _MARGIN + needed // 1000
    if disk.total and disk.free < needed:
        raise ConfigError(
            f"target={target} cannot be written: up to {needed:,} bytes are needed and "
            f"its disk has {disk.free:,} free; make room or give another one"
        )


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Gives a folder to fill, on the disk of the target, and puts it in place at the end.

    The folder's name follows from the target's, so that a later process finds and uses again what a
    killed one left. A lock keeps it from the folder of a process that still runs. After an error or
    an interrupt nothing is left.

    Raises:
      ConfigError: a target that is not absent or empty, or cannot be written.
    """
    check_target(target)
    place = Path(os.path.realpath(target))
    inside = os.path.isdir(place)
    folder = place / _INSIDE if inside else place.parent / f".{place.name}.converting"
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    lock = _opened(folder, target)
    try:
        _lock(lock, folder, target)
        try:
            _clear(folder)
            yield folder
            if inside:
                _move_up(folder, place, target)
            else:
                os.replace(folder, place)
        except BaseException as error:  # while the lock is held: later the name may be another's
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # one of them holds another process's file
                for path in made[1:]:
                    path.rmdir()
            if isinstance(error, OSError):
                raise ConfigError(f"target={target} cannot be written ({error})") from error
            raise
    finally:
        os.close(lock)  # releases the lock


def _opened(folder: Path, target: Path) -> int:
    """Makes the folder if it is absent; a descriptor of it, which is our own and no link."""
    here = f"{folder}, which target={target} is made in,"
    there = os.path.lexists(folder)
    if there and (folder.is_symlink() or not folder.is_dir()):
        raise ConfigError(f"{here} is no folder; remove it")
    try:
        folder.mkdir(parents=True, exist_ok=there)
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise ConfigError(f"target={target} cannot be written ({reason(error)})") from error
    if there and os.fstat(opened).st_uid != os.geteuid():
        os.close(opened)
        raise ConfigError(f"{here} belongs to another user; remove it")
    return opened


def _lock(lock: int, folder: Path, target: Path) -> None:
    """Locks the folder; ConfigError if another process has it, or may have it."""
    wait = f"another process is making target={target}; wait for it or give another one"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(wait) from error
    except OSError as error:  # a file system without locks
        if any(folder.iterdir()):
            raise ConfigError(f"{wait}; if there is none, remove {folder}") from error
    if not folder.exists() or not os.path.samestat(os.fstat(lock), folder.stat()):
        raise ConfigError(wait)  # it was renamed or removed between opening and locking


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _move_up(folder: Path, place: Path, target: Path) -> None:
    """Moves the content of the folder into the target that it is in, or none of it."""
    check_target(target)  # nothing may have been put there meanwhile
    moved: list[Path] = []
    try:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            moved.append(place / path.name)
            os.rename(path, moved[-1])
        folder.rmdir()
    except BaseException:
        for path in moved:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise
