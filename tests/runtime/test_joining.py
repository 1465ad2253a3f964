"""The connection of processes: addresses that cannot be, waiting aloud, peers that are gone."""

import socket

import jax
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.runtime import joining, processes


@pytest.mark.parametrize(
    "coordinator",
    ["localhost:99999", "localhost:0", "localhost:-1", "localhost", ":80", "a b:80", "http://a:80",
     "localhost:8٣", "localhost:", "", "host/x:80", "localhost:" + "9" * 5000],
)  # fmt: skip
def test_addresses_that_cannot_be(coordinator):
    with pytest.raises(ConfigError, match=r"^--coordinator is "):
        processes.start(coordinator, 2, 1)


def test_a_port_in_use_is_told_by_process_0():
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match="in use; give another port"):
            joining.check_address(f"localhost:{port}", here=True)
        joining.check_address(f"localhost:{port}", here=False)


@pytest.mark.parametrize(
    "how, words",
    [
        (("localhost:1234", None, None), "missing --processes and --process; a run of many"),
        (("localhost:1234", 0, 0), "--process=0 of --processes=0; expected"),
        (("localhost:1234", 2, 2), "--process=2 of --processes=2; expected"),
        (("localhost:1234", 2, -1), "--process=-1 of --processes=2; expected"),
        ((None, None, None, 0), "--emulate_devices=0; expected 1 to 1,024 devices"),
        ((None, None, None, 10**12), "--emulate_devices=1000000000000; expected 1 to 1,024"),
        ((None, None, None, None, 0), "--join_timeout=0; expected 1 to 604,800 seconds"),
        ((None, None, None, None, 10**9), "--join_timeout=1000000000; expected 1 to"),
    ],
    ids=str,
)
def test_flags_that_contradict(how, words):
    with pytest.raises(ConfigError, match=words):
        processes.start(*how)


@pytest.mark.parametrize(
    "said, found",
    [
        (
            "UNKNOWN: Gloo AllGather failed: [pair.cc:538] Read error [127.0.0.1]:39079: "
            "Connection reset by peer",
            "another process of this run is gone",
        ),
        (
            "UNAVAILABLE: heartbeat timeout of /job:jax_worker/replica:0/task:3",
            "process 3 of this run is gone",
        ),
        (
            "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n5\n",
            "process 5 of this run is gone",
        ),
        ("INVALID_ARGUMENT: shapes do not match", ""),
    ],
)
def test_errors_of_a_lost_process(monkeypatch, said, found):
    assert joining.lost(said) == ""  # of one process alone
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert joining.lost(said).startswith(found) and bool(joining.lost(said)) == bool(found)


FATAL = (
    "F1130 01:30:10.516356 323 client.h:80] Terminating process because the JAX distributed "
    "service detected fatal errors. See the other task logs. absl::Status: {}\n"
    "*** Check failure stack trace: ***\n"
)


@pytest.mark.parametrize(
    "log, named",
    [
        (
            FATAL.format("UNAVAILABLE: The following tasks are unhealthy (stopped sending "
                         "heartbeats):\n2\nThe tasks have crashed."),
            "process 2 of",
        ),
        (FATAL.format("UNAVAILABLE: Failed to send RPC to coordination service."), "process 0 of"),
        (
            FATAL.format("DEADLINE_EXCEEDED: x\n\nRPC: /xla.CoordinationService/Heartbeat"),
            "process 0 of",
        ),
        ("free(): invalid pointer\n", None),
    ],
)  # fmt: skip
def test_an_abort_of_xla_names_the_lost_and_another_abort_goes_on(monkeypatch, log, named):
    """With the words of XLA (jaxlib 0.10.2 and 0.12), where no process has a workdir yet."""
    ended = []
    monkeypatch.setattr(joining.signals, "end_code", lambda: None)  # other tests send signals
    monkeypatch.setattr(joining.native_output, "tail", lambda: log)
    monkeypatch.setattr(joining.leaving, "end", lambda code, line: ended.append((code, line)))
    monkeypatch.setattr(joining.progress, "current", joining.progress.Publisher(1, 4))
    monkeypatch.setattr(joining.distributed.global_state, "process_id", 1)
    joining._at_abort(6)
    if named is None:
        assert not ended
    else:
        [(code, line)] = ended
        assert code == 76 and line.startswith(f"error: {named} this run is gone or does not answer")
