"""Saved steps of a run: one directory per step, written by orbax in the background.

A step gets its number by one rename after its last byte is written, and loses it by one rename
before its first file is deleted. So a directory with a number was complete once, whenever the
process is killed. Later damage (a lost file, a flipped bit) is found on reading, by orbax or by the
bit sum of each leaf, and the step before is taken. A step with NaN or infinite values is neither
saved nor taken. A step that another process reads, under a shared `flock`, is removed after a later
save. No other module imports orbax.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from deepseek_jax.checkpoint import chunks as files
from deepseek_jax.checkpoint import manifest
from deepseek_jax.checkpoint.chunks import Leaves
from deepseek_jax.checkpoint.failed_save import failed_save
from deepseek_jax.checkpoint.quiet import silence
from deepseek_jax.checkpoint.reading import is_being_read, kept_for_reading
from deepseek_jax.checkpoint.tidy import check_writable, remove_leftovers
from deepseek_jax.config import ConfigError
from deepseek_jax.errors import LostPeer, RunError
from deepseek_jax.runtime.agreement import all_true, from_primary, raise_together
from deepseek_jax.runtime.background import in_background, leave_behind

PyTree = Any
T = TypeVar("T")
_PATIENCE_SECONDS = 10.0
_LOOK_SECONDS = 1.0  # between two looks at the folder, while a write goes on

_log = logging.getLogger(__name__)


class Store:
    """Saved steps of one run. All processes call every method with the same arguments."""

    def __init__(self, directory: Path, *, keep: int, check: Callable[[], None] = lambda: None):
        """Reads and writes `directory/STEP`; nothing is written before the first `save`.

        Args:
          directory: on a file system that all processes share.
          keep: how many of the newest steps stay.
          check: raises RunError in process 0 if it may not write here, and nothing elsewhere.

        Raises:
          ConfigError: `keep` is below one.
        """
        if keep < 1:
            raise ConfigError(f"checkpoint.keep is {keep}; expected at least 1")
        self._directory = Path(directory).absolute()
        self._keep, self._check = keep, check
        self._broken: set[int] = set()  # unreadable steps, renamed by the next save
        self._held: set[int] = set()  # steps that this store has saved or restored
        self._pending: Future[None] | None = None
        self._writing, self._bytes, self._why = -1, 0, ""  # newest save; why the newest is broken
        silence()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Closes the store; an error on the way out is not hidden by that of a save.

        With an error, a write that waits for another process is given up soon: it may have failed.
        """
        if error is None or isinstance(error, LostPeer):  # with which a write waits for ever
            return None if error else self.close()
        pending = [self._pending] if self._pending and jax.process_count() > 1 else []
        if futures.wait(pending, timeout=_PATIENCE_SECONDS).not_done:
            jax.distributed.shutdown()  # which ends orbax's wait: Python would wait for its thread
            return
        try:
            self.close()
        except RunError as failed:
            _log.warning("%s", failed)

    @property
    def newest(self) -> int:
        """The newest step that this store has restored, or has written to its end; 0 if none."""
        return max(self._held, default=0)

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Writes a step in the background, once the write of the step before has ended.

        Arrays in device memory are copied before this returns, so the caller may donate them.
        Arrays in host memory are read until the write ends, and must not change. A step that this
        store has saved or restored is not written again: a number names one state.

        Args:
          step: larger than every step in the directory.
          state: global arrays of any sharding, dtype and memory kind.
          meta: a small dictionary that JSON can hold.

        Raises:
          ConfigError: the directory holds this step or a later one, which was not restored.
          RunError: the write of the step before failed, on a full disk for example, or this one
            cannot begin; in all processes.
          manifest.NotFiniteLeaves: a leaf holds NaN or infinite values; nothing is written.
        """
        self.settle()
        if step in self._held:
            return
        newest = from_primary(max(self.steps(), default=-1))
        if newest >= step:
            raise ConfigError(
                f"{self._directory} already holds step {newest}, so step {step} cannot be saved; "
                "resume from it or choose another workdir"
            )
        leaves = manifest.named(state)
        looks = manifest.look(leaves)
        manifest.require_finite(leaves, looks)
        described = {
            name: [manifest.describe(leaf), seen.bits]
            for (name, leaf), seen in zip(leaves.items(), looks, strict=True)
        }
        record = manifest.sealed({"step": step, "meta": meta, "leaves": described})
        self._writing, self._bytes = step, sum(leaf.nbytes for leaf in leaves.values())
        raise_together(self._make_ready)
        self._broken.clear()
        try:
            with _in_chunks():
                path = self._path(step)
                response = ocp.save_async(path, leaves, custom_metadata=record)
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise self._failed(error) from error
        self._pending = in_background(functools.partial(self._finish, step, response), "checkpoint")

    def save_parts(
        self,
        step: int,
        like: dict[str, Any],
        part_of: Callable[[str, tuple[slice, ...]], np.ndarray],
        meta: dict[str, Any],
    ) -> None:
        """Writes a step from leaves that are made a part at a time, by one process, and waits.

        Args:
          like: objects with the shape and dtype of each leaf, by its dotted path.
          part_of: gives the values of a part of the leaf with this path.
        """
        assert jax.process_count() == 1 and not self.steps()
        directory = self._path(step)
        self._directory.mkdir(parents=True, exist_ok=True)
        ocp.save(directory, {name: np.zeros((), leaf.dtype) for name, leaf in like.items()})
        # Orbax records neither shapes nor values, so another array may replace that of a leaf. The
        # step counts as damaged until our own record is beside it.
        written = {}
        for name, leaf in like.items():
            part = functools.partial(part_of, name)
            sum_of_bits = files.write(directory / "state", name, leaf, part)
            written[name] = [manifest.describe(leaf), sum_of_bits]
        record = manifest.sealed({"step": step, "meta": meta, "leaves": written})
        file = directory / "_CHECKPOINT_METADATA"
        kept = json.loads(file.read_text()) | {"custom_metadata": record}
        file.write_text(json.dumps(kept))

    def restore(
        self,
        abstract: PyTree | Callable[[dict[str, Any], Collection[str]], PyTree],
        *,
        partial: bool = False,
        spare: str = "",
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Reads the newest step that is neither damaged nor NaN, in the shardings of `abstract`.

        Args:
          abstract: jax.ShapeDtypeStruct leaves with shardings, on any mesh; or a function that
            gives them for the `meta` of a step and the paths of the leaves that it holds.
          partial: whether to read only these leaves, where the step may hold others.
          spare: the part of the state that a step may hold although `abstract` does not.

        Returns:
          (step, state, meta), or None where nothing was ever saved.

        Raises:
          ConfigError: the checkpoint holds other leaves, or none of the steps can be read.
        """
        self.wait()
        for step, record in self._readable():
            held = record["leaves"].keys()
            like = abstract(record["meta"], held) if callable(abstract) else abstract
            wanted = manifest.named(like)
            others = {name for name in held - wanted.keys() if name.split(".")[0] == spare}
            manifest.compare(self._path(step), record, wanted, held if partial else others)
            some = partial or bool(others)
            leaves = self._attempt(step, functools.partial(self._load, step, wanted, some))
            if leaves is None:
                continue
            verify = functools.partial(manifest.verify, leaves, manifest.look, record)
            if not self._attempt(step, verify):
                continue
            self._held.add(step)
            state = jax.tree.unflatten(jax.tree.structure(like), leaves.values())
            return step, state, record["meta"]
        return None

    def open(self, wanted: PyTree) -> Leaves | None:
        """Opens the newest step that is not damaged and leaves its values on disk; for one process.

        Each leaf is read once, a chunk at a time, to compare its bit sum with the saved one.

        Args:
          wanted: leaves with shape and dtype; the step may hold others.

        Returns:
          A reader of these leaves by dotted path, or None where nothing was ever saved.

        Raises:
          ConfigError: as `restore`.
        """
        names = manifest.named(wanted)
        for step, record in self._readable():
            manifest.compare(self._path(step), record, names, record["leaves"].keys())
            path = self._path(step)
            leaves = Leaves(path / "state")
            if (kept := kept_for_reading(path)) is not None:
                weakref.finalize(leaves, os.close, kept)
            looks = functools.partial(manifest.look_on_disk, leaves)
            if self._attempt(step, functools.partial(manifest.verify, names, looks, record)):
                return leaves
        return None

    def newest_meta(self) -> dict[str, Any] | None:
        """The `meta` of the newest step; its arrays are not read and may still be damaged.

        Raises:
          ConfigError: none of the steps can be read.
        """
        return next((record["meta"] for _, record in self._readable()), None)

    def steps(self) -> list[int]:
        """Numbers of the steps on disk, oldest first, without those found damaged."""
        paths = self._directory.glob("*")
        found = {int(path.name) for path in paths if path.name.isdecimal() and path.is_dir()}
        return sorted(found - self._broken)

    @property
    def writing(self) -> int | None:
        """The step whose write in the background was not waited for yet."""
        return None if self._pending is None else self._writing

    def done(self, seconds: float) -> bool:
        """Whether the write in the background ends within so many seconds, or there is none."""
        return self._pending is None or bool(futures.wait([self._pending], seconds).done)

    def failure(self) -> RunError | None:
        """The error that ended the write in the background, once; waits for nothing."""
        if self._pending is None or not self._pending.done():
            return None
        try:
            self.wait()
        except RunError as error:
            return error
        return None

    def wait(self) -> None:
        """Waits for the write in the background; RunError if it failed."""
        pending, self._pending = self._pending, None
        if pending:
            try:
                pending.result()
            except Exception as error:  # orbax and tensorstore raise many kinds
                raise self._failed(error) from error

    def settle(self) -> None:
        """Waits in all processes; RunError in all of them as soon as the write failed in one."""
        if jax.process_count() == 1:
            self.wait()
            return
        looked = time.monotonic()

        def look() -> None:
            nonlocal looked
            if failed := self.failure():
                raise failed
            if (now := time.monotonic()) - looked > _LOOK_SECONDS:
                looked = now
                self._check()  # where the folder is gone, orbax may wait for ever

        while True:
            raise_together(look)  # the others would wait in orbax for the one that failed
            if all_true(self._pending is None):
                return
            time.sleep(0.01)

    def reject(self, step: int) -> None:
        """Counts a step as unusable from now on; the next save moves it aside."""
        self._held.discard(step)
        self._broken.add(step)
        self._why = self._why or "led to an anomaly again"

    def close(self) -> None:
        """Waits for the write in the background."""
        self.wait()

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _readable(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Steps with a readable record, newest first; ConfigError if all steps are damaged."""
        tried: set[int] = set()
        while (step := from_primary(max(set(self.steps()) - tried, default=-1))) >= 0:
            tried.add(step)
            record = self._attempt(step, functools.partial(self._record, step))
            if record is not None:
                yield step, record
        if self._broken:
            raise ConfigError(
                f"{self._directory} holds {len(self._broken)} checkpoints and none can be used "
                f"(the newest {self._why}); repair or remove them, or choose another workdir"
            )

    def _attempt(self, step: int, read: Callable[[], T]) -> T | None:
        """The result of `read`; None, after one warning, if it fails in any process."""
        value, what, why = None, "cannot be read", "another process cannot read it"
        try:
            value = read()
        except manifest.NotFiniteLeaves as error:
            what, why = "holds NaN or infinite values", str(error)
        except Exception as error:  # orbax raises bare Exception for a lost data file
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if all_true(value is not None):
            return value
        self._broken.add(step)
        self._why = self._why or f"{what}: {why}"
        if jax.process_index() == 0:
            path = self._path(step)
            _log.warning("checkpoint %s %s, trying an older one (%s)", path, what, why)
        return None

    def _record(self, step: int) -> dict[str, Any]:
        """The record that `save` wrote beside the arrays; for a truncated one orbax gives {}."""
        record = ocp.metadata(self._path(step)).custom_metadata
        whole = isinstance(record, dict) and manifest.sealed(record) == record
        if not whole or record["step"] != step:
            raise ValueError("its metadata is damaged")
        return record

    def _load(self, step: int, wanted: dict[str, Any], partial: bool) -> dict[str, jax.Array]:
        path = self._path(step)
        kept = kept_for_reading(path)
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        # Orbax would wait for the other processes after reading, for ever if one of them failed.
        context.multiprocessing.active_processes = {jax.process_index()}
        context.multiprocessing.primary_host = jax.process_index()
        try:
            with context:
                leaves = ocp.load(path, wanted)
        finally:
            if kept is not None:
                os.close(kept)
        return {name: leaves[name] for name in wanted}

    def _finish(self, step: int, response: ocp.AsyncResponse[None]) -> None:
        """Waits in the background for the commit, then removes the steps that are too old."""
        response.result()
        self._held.add(step)
        if jax.process_index() == 0:
            self._check()
            for old in self.steps()[: -self._keep]:
                if is_being_read(self._directory / str(old)):
                    continue
                gone = self._directory / f"{old}.deleted"
                (self._directory / str(old)).rename(gone)
                shutil.rmtree(gone, ignore_errors=True)

    def _failed(self, error: Exception, *, begun: bool = True) -> RunError:
        """The error of a save, in one line; makes room by removing what the save has left.

        Args:
          begun: whether processes may be writing.
        """
        leave_behind()
        try:
            self._check()
        except RunError as gone:
            self._take_back()
            return gone
        step = self._directory / str(self._writing)
        there = step.with_name(str(self.newest)).is_dir()
        newest, alone = self.newest if there else None, jax.process_count() == 1 or not begun
        failed = failed_save(error, step, self._bytes, newest, alone=alone)
        if jax.process_count() == 1:  # other processes may still be writing
            remove_leftovers(self._directory)
        return failed

    def _take_back(self) -> None:
        """Removes the step that was being written where the folder is not this run's any more."""
        for path in self._directory.glob(f"{self._writing}*"):
            if path.name in (str(self._writing), f"{self._writing}.orbax-checkpoint-tmp"):
                shutil.rmtree(path, ignore_errors=True)
        for folder in (self._directory, self._directory.parent):
            with contextlib.suppress(OSError):  # gone, or with files of another
                folder.rmdir()

    def _make_ready(self) -> None:
        """Checks and tidies the directory before a save, on process 0."""
        if jax.process_index() == 0:
            self._check()
            try:
                self._tidy()
            except OSError as error:
                raise self._failed(error, begun=False) from error

    def _tidy(self) -> None:
        """Renames damaged steps and removes the leftovers of killed processes, before a save."""
        if not self._held:  # else the directory is there, or was removed and is not made again
            self._directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._directory)
        check_writable(self._directory)
        for step in self._broken:
            path, aside = self._path(step), self._directory / f"{step}.broken"
            if path.exists():
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)


@contextlib.contextmanager
def _in_chunks() -> Iterator[None]:
    """Has orbax save leaves in chunks instead of one chunk for each device's part of a leaf."""

    def options(path: Any, leaf: jax.Array) -> Any:
        cut = files.axes_to_cut(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        if cut is None:
            return None
        kind = ocp.options.ArrayOptions.Saving.StorageOptions
        return kind(chunk_byte_size=files.CHUNK_BYTES, shard_axes=cut)

    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = options
    with context:
        yield
