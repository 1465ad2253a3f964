"""Compiled programs on disk: JAX's persistent compilation cache over a folder that is checked.

JAX makes the key of a program: its StableHLO, the compile options with the device assignment, the
backend and its flags, jaxlib's version. `_machine` adds what that key leaves out. The file of a
program begins with a hash of its name and content, is written beside its place and appears by an
atomic rename, so that any number of processes may share the folder; a file that does not agree
with its hash is compiled and written again. The programs that were used longest ago are removed
where the folder outgrows its bound.

A run of several processes keeps none: JAX's key differs between them on CPUs, and its process 0
alone writes, so that some would read a program while the others wait for them to compile it.
"""

import contextlib
import hashlib
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from deepseek_jax import host_cpu
from deepseek_jax.config.hints import one_line
from deepseek_jax.errors import reason

FORMAT = 1  # version of the files, part of every name
MOST_BYTES = 2 << 30  # of a folder, where JAX_COMPILATION_CACHE_MAX_SIZE gives no other bound
SUFFIX = ".program"

_DIGEST = 16  # bytes
_SCRATCH = ".writing"
_ABANDONED = 24 * 3600 * 10**9  # ns without a change, for a scratch file of a process that died
_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,  # a start has many small programs
    # XLA would write its own files of autotuning there, with neither hash nor bound.
    "jax_persistent_cache_enable_xla_caches": "none",
}


def keep(folder: str | None) -> None:
    """Keeps the programs that this process compiles from now on, and reads those kept before.

    Call it after the processes of a run have joined.

    Args:
      folder: the folder; "off" for none; None for JAX_COMPILATION_CACHE_DIR, without which it is
        deepseek_jax/programs in the user's cache folder. A folder that cannot be used costs a
        warning. In a run of several processes JAX's own settings hold.
    """
    if jax.process_count() > 1 and folder != "off":
        if folder is not None:
            _warn("each process of a run of several compiles its own")
        return
    try:
        root = _root(folder)
    except RuntimeError:  # no home folder
        _warn("this user has no home folder; give --compilation_cache=DIR")
        root = None
    jax.config.update("jax_compilation_cache_dir", None if root is None else str(root))
    for name, value in _SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    compilation_cache.reset_cache()
    if root is None:
        return
    most = jax.config.values["jax_compilation_cache_max_size"]
    programs = Programs(root, MOST_BYTES if most < 0 else most)
    compilation_cache.get_file_cache = lambda path: (programs, path)


class Programs(CacheInterface):
    """The folder of compiled programs, to which JAX gives and from which it takes.

    Args:
      folder: made when the first program is written, for this user alone.
      most_bytes: bound of the sum of its programs.
    """

    def __init__(self, folder: Path, most_bytes: int):
        self._path = folder
        self._machine = _machine()
        self._most_bytes = most_bytes
        self._left: int | None = None  # bytes to write before the folder is looked through again
        self._readable = self._writable = True

    def get(self, key: str) -> bytes | None:
        """The program under JAX's `key`; None if it was not kept or its file is damaged."""
        name = self._name(key)
        if not self._readable:
            return None
        file = self._path / name
        try:
            content = file.read_bytes()
            program = content[_DIGEST:]
            if content[:_DIGEST] == _digest(name.encode(), program):
                with contextlib.suppress(OSError):  # of a folder that others write
                    os.utime(file)
                return program
            with contextlib.suppress(OSError):
                file.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            self._readable = False
            self._give_up("read", error)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program; one that is under `key` already is replaced."""
        if not self._writable or len(value) + _DIGEST > self._most_bytes:
            return
        name = self._name(key)
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(len(value) + _DIGEST)
            descriptor, scratch = tempfile.mkstemp(suffix=_SCRATCH, dir=self._path)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(_digest(name.encode(), value))
                    stream.write(value)
                os.replace(scratch, self._path / name)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(scratch)
                raise
        except OSError as error:
            self._give_up("written", error)

    def _name(self, key: str) -> str:
        module = key.rpartition("-")[0][:60]
        return f"{module}-{_digest(self._machine, key.encode()).hex()}{SUFFIX}"

    def _make_room(self, size: int) -> None:
        """Removes the programs used longest ago where `size` more bytes pass the bound.

        A quarter of the bound is made free at once, and the folder is looked through again only
        after as many bytes as were free. Several processes may pass the bound by that in the
        meantime.
        """
        if self._left is not None and size <= self._left:
            self._left -= size
            return
        found, abandoned = [], time.time_ns() - _ABANDONED
        with os.scandir(self._path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    left = entry.name.endswith(_SCRATCH) and status.st_mtime_ns < abandoned
                    if left or entry.name.endswith(SUFFIX):
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = size + sum(bytes_ for _, bytes_, _ in found)
        if total > self._most_bytes:
            for _, bytes_, path in sorted(found):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                total -= bytes_
                if total <= self._most_bytes * 3 // 4:
                    break
        self._left = self._most_bytes - total

    def _give_up(self, what: str, error: OSError) -> None:
        """Writes no more; after a write that failed, good programs are still read."""
        warned, self._writable = not self._writable, False
        if warned:
            return
        _warn(
            f"{one_line(self._path)} cannot be {what} ({reason(error)}); give "
            "--compilation_cache=DIR, or off"
        )


def _warn(why: str) -> None:
    """Warns of it once for all processes of a run."""
    if jax.process_index() == 0:
        warnings.warn(f"compiled programs are not kept: {why}", stacklevel=3)


def _root(folder: str | None) -> Path | None:
    """The folder of the programs; RuntimeError where it is in a home that there is not."""
    if folder == "off":
        return None
    given = folder or jax.config.values["jax_compilation_cache_dir"]
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home, "deepseek_jax", "programs").expanduser()


def _machine() -> bytes:
    """All that a program depends on besides JAX's key for it.

    XLA writes machine code for the features of this CPU, divides loops by the number of its cores,
    and calls into the libraries of the installed wheels and of the driver.
    """
    said = [str(FORMAT), jax.__version__, sys.platform, platform.machine()]
    said += [str(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ""]
    said += host_cpu.lines()
    for folder in sys.path:
        with contextlib.suppress(OSError):
            said += sorted(
                name
                for name in os.listdir(folder)
                if name.endswith(".dist-info") and name.startswith(("jax", "nvidia", "libtpu"))
            )
    said += [_text("/proc/driver/nvidia/version")]
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):  # the name of a file of flags
        said += [_text(flags)]
    return "\n".join(said).encode(errors="surrogateescape")


def _text(file: str) -> str:
    try:
        return Path(file).read_text(errors="surrogateescape")
    except OSError:
        return ""


def _digest(*parts: bytes) -> bytes:
    hashed = hashlib.blake2b(digest_size=_DIGEST)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.digest()
