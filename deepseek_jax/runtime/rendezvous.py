"""Rendezvous of the processes of a run, before any of them joins JAX's coordinator.

JAX's own join ends, after its time, without saying who is missing. A process that joins while an
earlier attempt of the run still goes on aborts all processes of it, and one that is left over from
an earlier attempt is taken for one of this attempt. So all processes meet first at the
coordinator's port, where process 0 listens: each says its number, host and attempt. When all have
come, process 0 lets them go on, and the port is free for JAX. Where some do not come in time, one
is gone before all have come, or one belongs to another attempt, process 0 says so to those that
wait.
"""

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

GO = "go"
_LONGEST = 4096  # bytes of a message
_RETRY_SECONDS, _BUSY_SECONDS = 0.2, 2.0
_MOST_NAMED = 10


class Failed(Exception):
    """The processes did not come together; the message says why, in one line."""


def meet(
    address: str,
    process: int,
    processes: int,
    attempt: str,
    timeout: float,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Returns when all processes have come.

    Args:
      address: HOST:PORT of the coordinator.
      attempt: name of this start of the run, the same in all its processes; "" for any.
      timeout: seconds from now on.
      say: is told, now and then, for whom this process waits.

    Raises:
      Failed: a process did not come, was lost, or is of another attempt.
    """
    if processes == 1:
        return
    until = time.monotonic() + timeout
    if process == 0:
        _Host(address, processes, attempt, timeout, say).wait(until)
    else:
        _visit(address, process, processes, attempt, timeout, until, say)


class _Host:
    """Process 0, where the others come."""

    def __init__(
        self, address: str, processes: int, attempt: str, timeout: float, say: Callable[[str], None]
    ):
        self._processes, self._attempt, self._timeout = processes, attempt, timeout
        self._say, self._said = say, ""
        self._here: dict[int, tuple[socket.socket, str]] = {}
        self._select = selectors.DefaultSelector()
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._listener = socket.create_server(
            ("", int(address.rpartition(":")[2])),
            family=family,
            dualstack_ipv6=family == socket.AF_INET6,
            backlog=4096,
        )
        self._select.register(self._listener, selectors.EVENT_READ)

    def wait(self, until: float) -> None:
        try:
            while len(self._here) < self._processes - 1:
                if time.monotonic() >= until:
                    raise Failed(f"{self._missing()} did not come in {self._timeout:.0f} s")
                for key, _ in self._select.select(0.5):
                    if key.fileobj is self._listener:
                        visitor, _ = self._listener.accept()
                        visitor.setblocking(False)
                        self._select.register(visitor, selectors.EVENT_READ, b"")
                    else:
                        self._hear(key)
                self._say(f"{self._missing()} to come")
            self._answer(GO)
        except Failed as failed:
            self._answer(str(failed))
            raise
        finally:
            self._close()

    def _hear(self, key: selectors.SelectorKey) -> None:
        visitor: Any = key.fileobj
        try:
            text = visitor.recv(_LONGEST)
        except OSError:
            text = b""
        whole = (key.data or b"") + text
        if not text:
            self._select.unregister(visitor)
            visitor.close()
            for number, (other, host) in self._here.items():
                if other is visitor:
                    raise Failed(
                        f"process {number} (on {host}) is gone while others joined, before "
                        f"{self._missing()} came"
                    )
        elif key.data is None or len(whole) > _LONGEST:
            return
        elif not whole.endswith(b"\n"):
            self._select.modify(visitor, selectors.EVENT_READ, whole)
        else:
            self._select.modify(visitor, selectors.EVENT_READ, None)
            self._welcome(visitor, whole)

    def _welcome(self, visitor: socket.socket, text: bytes) -> None:
        try:
            told = json.loads(text)
            number, host = int(told["process"]), str(told["host"])[:100]
            processes, attempt = int(told["processes"]), str(told["attempt"])
        except (ValueError, TypeError, KeyError):
            self._refuse(visitor, "this is the coordinator of a run")
            return
        if attempt and self._attempt and attempt != self._attempt:
            self._refuse(
                visitor,
                f"process {number} is of attempt {attempt}, and attempt {self._attempt} has begun",
            )
        elif processes != self._processes or not 0 < number < processes:
            self._refuse(
                visitor,
                f"this run has {self._processes} processes, and process {number} was told of "
                f"{processes}",
            )
        else:
            if number in self._here:  # of two with one number the later one is the restarted one
                self._refuse(self._here.pop(number)[0], f"a later process {number} has come")
            self._here[number] = visitor, host

    def _refuse(self, visitor: socket.socket, why: str) -> None:
        self._select.unregister(visitor)
        with contextlib.suppress(OSError):
            visitor.sendall(f"{why}\n".encode())
        visitor.close()

    def _answer(self, text: str) -> None:
        for visitor, _ in self._here.values():
            with contextlib.suppress(OSError):
                visitor.sendall(f"{text}\n".encode())

    def _missing(self) -> str:
        numbers = sorted(set(range(1, self._processes)) - self._here.keys())
        named = ", ".join(map(str, numbers[:_MOST_NAMED]))
        more = f" and {len(numbers) - _MOST_NAMED} more" if len(numbers) > _MOST_NAMED else ""
        return f"process {named}{more} of {self._processes}"

    def _close(self) -> None:
        for key in list(self._select.get_map().values()):
            held: Any = key.fileobj
            held.close()
        self._select.close()


def _visit(
    address: str,
    process: int,
    processes: int,
    attempt: str,
    timeout: float,
    until: float,
    say: Callable[[str], None],
) -> None:
    """Comes to process 0, tries again until it listens, and waits for its answer."""
    host, _, port = address.rpartition(":")
    me = {"process": process, "processes": processes, "attempt": attempt}
    hello = json.dumps(me | {"host": socket.gethostname(), "pid": os.getpid()}) + "\n"
    nobody = f"process 0 did not answer at {address} in {timeout:.0f} s"
    while True:
        left = until - time.monotonic()
        if left <= 0:
            raise Failed(nobody)
        say(f"process 0 at {address}")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), min(left, 5.0)) as there:
                there.sendall(hello.encode())
                answer = _answer(there, until + 5.0, say)
        except OSError:
            time.sleep(min(_RETRY_SECONDS, left))
            continue
        if answer is None:
            raise Failed(nobody)
        if answer.startswith("\0"):  # HTTP/2 of JAX: the processes of an earlier attempt go on
            nobody = f"process 0 at {address} is in an attempt that goes on, {timeout:.0f} s later"
            time.sleep(min(_BUSY_SECONDS, left))
            continue
        if not answer:
            raise Failed(f"process 0 at {address} is gone while processes joined")
        if answer != GO:
            raise Failed(answer)
        return


def _answer(there: socket.socket, until: float, say: Callable[[str], None]) -> str | None:
    """Answer of process 0; "" where it is gone, None where it says nothing in time."""
    text = b""
    there.settimeout(0.5)
    while not text.endswith(b"\n"):
        if time.monotonic() >= until:
            return None
        say("process 0 to say that all have come")
        try:
            part = there.recv(_LONGEST)
        except TimeoutError:
            continue
        except ConnectionError:
            part = b""
        text += part
        if not part or text.startswith(b"\0"):
            break
    return text.decode(errors="replace").strip()
