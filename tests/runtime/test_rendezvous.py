"""Processes that meet: all come, some do not, one is lost, one is of an earlier attempt."""

import contextlib
import json
import socket
import threading
from concurrent.futures import Future

import pytest

from deepseek_jax.runtime import rendezvous


@pytest.fixture
def address():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return f"localhost:{listener.getsockname()[1]}"


def come(address: str, process: int, processes: int, attempt: str = "", timeout: float = 20.0):
    """The future of a process that meets the others."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            rendezvous.meet(address, process, processes, attempt, timeout)
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def hello(address: str, process: int, processes: int) -> socket.socket:
    """The connection of a process that has said its number, and could be killed now."""
    host, port = address.split(":")
    there = None
    while there is None:
        with contextlib.suppress(ConnectionRefusedError):
            there = socket.create_connection((host, int(port)))
    me = {"process": process, "processes": processes, "attempt": "", "host": "node7"}
    there.sendall(json.dumps(me).encode() + b"\n")
    return there


def test_all_go_on_when_all_have_come_and_the_port_is_free_again(address):
    for future in [come(address, number, 4) for number in (2, 0, 3, 1)]:
        assert future.result(timeout=30) is None
    with socket.create_server(("", int(address.split(":")[1]))):
        pass


def test_a_process_that_never_comes_is_named_to_all(address):
    there = [come(address, number, 4, timeout=2.0) for number in (0, 3)]
    for future in there:
        with pytest.raises(rendezvous.Failed, match=r"process 1, 2 of 4 did not come in 2 s"):
            future.result(timeout=30)


def test_process_0_that_never_comes_is_named(address):
    with pytest.raises(rendezvous.Failed, match=f"process 0 did not answer at {address} in 1 s"):
        come(address, 1, 2, timeout=1.0).result(timeout=30)


def test_process_0_that_hangs_is_named(address):
    """The kernel takes the connection of a stopped process, which then says nothing."""
    with (
        socket.create_server(("", int(address.split(":")[1]))),
        pytest.raises(rendezvous.Failed, match="process 0 did not answer"),
    ):
        come(address, 1, 2, timeout=1.0).result(timeout=30)


def test_a_process_that_is_killed_while_others_join_is_named(address):
    first = come(address, 0, 4)
    lost = hello(address, 2, 4)
    other = come(address, 1, 4)
    threading.Event().wait(1.0)
    lost.close()
    said = r"process 2 \(on node7\) is gone while others joined, before process 3 of 4 came"
    for future in (first, other):
        with pytest.raises(rendezvous.Failed, match=said):
            future.result(timeout=30)


def test_what_is_left_of_an_earlier_attempt_is_refused_and_harms_nothing(address):
    first = come(address, 0, 2, "42.1")
    with pytest.raises(
        rendezvous.Failed, match=r"process 1 is of attempt 42\.0, and attempt 42\.1"
    ):
        come(address, 1, 2, "42.0").result(timeout=30)
    assert not first.done()
    assert come(address, 1, 2, "42.1").result(timeout=30) is None
    assert first.result(timeout=30) is None


def test_of_two_with_one_number_the_later_one_counts(address):
    first = come(address, 0, 3)
    earlier = hello(address, 1, 3)
    threading.Event().wait(0.5)
    later = come(address, 1, 3)
    assert b"a later process 1 has come" in earlier.makefile("rb").readline()
    third = come(address, 2, 3)
    for future in (first, later, third):
        assert future.result(timeout=30) is None


def test_another_number_of_processes_is_refused(address):
    first = come(address, 0, 2)
    with pytest.raises(rendezvous.Failed, match="this run has 2 processes, and process 1 was told"):
        come(address, 1, 3).result(timeout=30)
    assert come(address, 1, 2).result(timeout=30) is None
    assert first.result(timeout=30) is None


def test_noise_at_the_port_is_no_process(address):
    first = come(address, 0, 2)
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"process": "x"}\n', b"\xff" * 9000):
        port = int(address.split(":")[1])
        there = None
        while there is None:
            with contextlib.suppress(ConnectionRefusedError):
                there = socket.create_connection(("localhost", port))
        with there:
            there.sendall(noise)
    assert come(address, 1, 2).result(timeout=30) is None
    assert first.result(timeout=30) is None


def test_a_coordinator_that_runs_already_is_waited_for(address):
    """JAX's service speaks first, in HTTP/2; the attempt that it belongs to may end soon."""
    with socket.create_server(("", int(address.split(":")[1]))) as service:
        waiting = come(address, 1, 2, timeout=20.0)
        there, _ = service.accept()
        there.sendall(b"\0\0\x0c\x04\0\0\0\0\0")
        there.close()
    first = come(address, 0, 2)
    assert waiting.result(timeout=30) is None and first.result(timeout=30) is None
