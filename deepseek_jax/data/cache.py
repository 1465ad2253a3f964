"""Cache of prepared data: folders that are checked by content at each opening.

The name of a folder (an entry) is a hash of all that its content depends on. An entry is made in a
scratch folder beside it and appears by an atomic rename, so that any number of processes may start
at once and share the first complete one. Its `meta.json` has a hash of every file, and of these
with the name of the folder; an entry that does not agree with it, or that `read` refuses, is made
again.

A scratch folder has a lock that ends with its process. Those of dead processes are removed when
the next entry is made.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import one_line
from deepseek_jax.data import hashing
from deepseek_jax.data.files import open_regular, resolve
from deepseek_jax.errors import reason

FORMAT = 3  # version of the entries, part of every key

T = TypeVar("T")

_LOCK = ".lock"
_SCRATCH = re.compile(r"\.[0-9a-f]{32}-")
_ABANDONED = 24 * 3600  # seconds without a change, for a scratch folder whose lock tells nothing
_ATTEMPTS = 3  # processes that repair one entry at the same time may undo one another's work once


class Damaged(ValueError):
    """Content of an entry that is not what was written."""


class Entry:
    """An entry whose files agree with their hashes.

    Attributes:
      folder: Its folder.
      facts: Values that `build` returned.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            raise Damaged("it is not a folder")
        meta = json.loads(self._bytes("meta.json"))
        if meta["hash"] != _hash_of(folder.name, meta["facts"], meta["files"]):
            raise Damaged("meta.json is not what was written")
        self.facts: dict[str, Any] = meta["facts"]
        self._files: dict[str, str] = meta["files"]
        for name in self._files:
            with self.open(name) as descriptor:
                if hashing.of_file(descriptor) != self._files[name]:
                    raise Damaged(f"{name} is not what was written")

    def hash_of(self, name: str) -> str:
        """Hash of a file."""
        return self._files[name]

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[int]:
        """Descriptor of a file."""
        descriptor = open_regular(self.folder / name, follow=False)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def array(self, name: str) -> np.ndarray:
        """Array of a `.npy` file, in memory."""
        with self.open(name) as descriptor, os.fdopen(os.dup(descriptor), "rb") as stream:
            return np.load(stream, allow_pickle=False)

    def _bytes(self, name: str) -> bytes:
        with self.open(name) as descriptor, os.fdopen(os.dup(descriptor), "rb") as stream:
            return stream.read()


def entry(
    cache: str,
    made_of: Sequence[str],
    build: Callable[[Path], dict[str, Any]],
    read: Callable[[Entry], T],
    say: Callable[[str], None],
) -> T:
    """Opens the entry for `made_of`, and makes it first if it is missing or damaged.

    Args:
      cache: `data.cache`.
      made_of: Everything that the content depends on.
      build: Fills a folder, and returns JSON values to keep.
      read: Reads an entry; raises an error of any kind if its content cannot be right.
      say: Receives a line on a damaged entry.

    Raises:
      ConfigError: A cache that cannot be written, or an entry that cannot be made again.
    """
    root = _root(cache)
    words = "\n".join([str(FORMAT), *made_of]).encode(errors="surrogatepass")
    folder = root / hashlib.blake2b(words, digest_size=16).hexdigest()
    for attempt in range(_ATTEMPTS):
        if not os.path.lexists(folder):
            _make(root, folder, build)
        try:
            return read(Entry(folder))
        except ConfigError:
            raise
        except Exception as error:  # a damaged file has errors of any kind
            cause = reason(error)
            if attempt == _ATTEMPTS - 1 or not _set_aside(root, folder):
                raise ConfigError(
                    f"data.cache: {one_line(folder)} is damaged ({cause}); delete it to build it "
                    "again"
                ) from error
            say(f"data: {one_line(folder)} is damaged ({cause}); building it again")
    raise AssertionError("the last attempt returns or raises")


def _root(cache: str) -> Path:
    """Folder of the cache."""
    if cache:
        return resolve("data.cache", cache)
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(home, "deepseek_jax").expanduser()
    except RuntimeError as error:
        raise ConfigError(
            "the cache folder ~/.cache/deepseek_jax cannot be found, as this user has no home "
            "folder; set data.cache to a writable folder"
        ) from error


def _make(root: Path, folder: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    """Makes an entry; that of another process is kept if it came first."""
    with _writing(root), contextlib.ExitStack() as undone:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
        undone.callback(shutil.rmtree, scratch, ignore_errors=True)
        undone.callback(os.close, _locked(scratch))
        facts = build(scratch)
        names = sorted({file.name for file in scratch.iterdir()} - {_LOCK})
        files = {name: _written(scratch / name) for name in names}
        meta = {"facts": facts, "files": files, "hash": _hash_of(folder.name, facts, files)}
        (scratch / "meta.json").write_text(json.dumps(meta))
        (scratch / _LOCK).unlink()
        scratch.chmod(0o755)  # readable for other users of a shared cache
        try:
            scratch.rename(folder)
        except OSError:
            if not os.path.lexists(folder):  # else another process was first
                raise


def _written(file: Path) -> str:
    """Hash of a file that was just written."""
    descriptor = open_regular(file, follow=False)
    try:
        return hashing.of_file(descriptor)
    finally:
        os.close(descriptor)


def _hash_of(name: str, facts: dict[str, Any], files: dict[str, str]) -> str:
    words = json.dumps([name, facts, files], sort_keys=True)
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Turns errors of writing into a ConfigError; those of reading data are such already."""
    try:
        yield
    except BrokenPipeError:  # of the screen, to which `build` reports
        raise
    except OSError as error:
        raise ConfigError(
            f"the cache folder {one_line(root)} cannot be written ({reason(error)}); set "
            "data.cache to a writable folder with room for the tokens"
        ) from error


def _set_aside(root: Path, folder: Path) -> bool:
    """Removes a damaged entry, if that is allowed; processes that use its files keep them."""
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
    except OSError:
        return False
    try:
        os.rename(folder, aside / "damaged")
    except OSError as error:
        return isinstance(error, FileNotFoundError)  # another process was first
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return True


def _locked(scratch: Path) -> int:
    """Descriptor of the lock of a scratch folder; the lock ends when the descriptor is closed."""
    descriptor = os.open(scratch / f"{_LOCK}.new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(descriptor, _machine())
    os.rename(scratch / f"{_LOCK}.new", scratch / _LOCK)
    return descriptor


def _machine() -> bytes:
    """Identity of this machine since it was started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return socket.gethostname().encode()


def _remove_leftovers(root: Path) -> None:
    """Removes scratch folders whose process is dead: killed, or gone with its machine."""
    for folder in root.iterdir():
        if _SCRATCH.match(folder.name) and not folder.is_symlink():
            with contextlib.suppress(OSError):
                if _is_dead(folder):
                    shutil.rmtree(folder, ignore_errors=True)


def _is_dead(scratch: Path) -> bool:
    """Whether nobody fills a scratch folder any more.

    The lock of a process on this machine tells it at once. A file system may not show the locks of
    other machines, so that their folders must also be unchanged for a day.
    """
    times = [scratch.stat().st_mtime, *(file.lstat().st_mtime for file in scratch.iterdir())]
    old = time.time() - max(times) > _ABANDONED
    try:
        descriptor = os.open(scratch / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return old  # older versions had no lock
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return old or os.read(descriptor, 256) == _machine()
    except OSError:
        return False  # locked, or a file system without locks
    finally:
        os.close(descriptor)
