"""TensorBoard events of a run, written as they come.

tensorboardX's own writer hands events to a thread through a queue of ten. The thread ends on the
first error of the disk, and whoever fills the queue then waits for ever. So only its protocol
buffers and checksums are used here.
"""

import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.train.append import AppendedFile
from deepseek_jax.train.metrics import Row


class Events:
    """TensorBoard scalars; a resumed run hides those of steps after its checkpoint."""

    lost = "its events are dropped until it can"

    def __init__(self, folder: Path):
        self.name = str(folder)
        self._folder = folder
        self._file: AppendedFile | None = None
        self._purge: int | None = None
        self._first = 0

    def begin(self, step: int, tokens: int) -> None:
        self._first = step
        self._purge = step + 1 if self._folder.exists() else None
        self._open()

    def say(self, text: str) -> None:
        pass

    def step(self, row: Row) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2

        file = self._file or self._open()
        scalars = {
            key: value
            for key, value in row.items()
            if isinstance(value, int | float) and key != "step"
        }
        with np.errstate(over="ignore"):
            values = [
                summary_pb2.Summary.Value(tag=key, simple_value=float(np.float32(value)))
                for key, value in scalars.items()
            ]
        summary = summary_pb2.Summary(value=values)
        event = event_pb2.Event(wall_time=time.time(), step=row["step"], summary=summary)
        try:
            file.append(_record(event))
        except FileNotFoundError:
            self._file = None  # its folder was removed: the next row begins another file
            raise

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _open(self) -> AppendedFile:
        """Begins a file; its name ends in the second and the step that the run begins after."""
        from tensorboardX.proto import event_pb2

        self._folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{self._first}"
        file = AppendedFile(self._folder / name, create=True)
        head = [event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")]
        if self._purge is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            head.append(event_pb2.Event(step=self._purge, session_log=start))
        file.append(b"".join(map(_record, head)))
        self._file = file
        return file


def _record(event: Any) -> bytes:
    """An event as a TFRecord: length, its checksum, data, its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(checks) + data + next(checks)
