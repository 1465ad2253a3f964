"""Two processes meet bad batches, and do the same as one process with as many devices."""

import socket
import subprocess
import sys

import numpy as np
import pytest
import runs

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from pathlib import Path
import pytest
sys.path[:0] = ["tests"]
from deepseek_jax.runtime import processes
port, count, rank, rule, workdir, text = sys.argv[1:]
if count == "2":
    processes.start(f"localhost:{port}", 2, int(rank), emulate_devices=2)
else:
    processes.start(emulate_devices=4)
import runs
from poisoned import poison
from deepseek_jax.train import loop

poison(pytest.MonkeyPatch(), nan={8 * 7, 8 * 13})
config = runs.tiny(
    Path(text),
    mesh={"gpu": 4},
    batch={"sequences": 8, "ramp_sequences": 8, "micro_sequences": 8},
    schedule={"tokens": 20 * 8 * 32},
    evaluation={"tokens": 0},
    anomaly={"rule": rule, "window": 8},
)
summary = loop.train(config, Path(workdir), screen=False)
print(summary["step"], summary["skipped_steps"], summary["rewinds"])
"""


def go(count, rule, workdir, text):
    """What each of the processes prints."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    started = [
        subprocess.Popen(
            [
                sys.executable, "-c", PROGRAM,
                str(port), str(count), str(rank), rule, str(workdir), str(text),
            ],
            cwd=runs.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=550) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, err) in zip(started, told, strict=True):
        assert process.returncode == 0, err
    return [out.splitlines()[-1] for out, _ in told]


@pytest.mark.parametrize("rule, said", [("skip", "20 2 0"), ("rewind", "20 0 2")])
def test_processes_decide_alike(text, tmp_path, rule, said):
    assert go(2, rule, tmp_path / "two", text) == [said] * 2
    assert go(1, rule, tmp_path / "one", text) == [said]
    two, one = runs.rows(tmp_path / "two"), runs.rows(tmp_path / "one")
    assert [row["step"] for row in two] == [row["step"] for row in one] == list(range(1, 21))
    for key in ("skipped_steps", "rewinds", "tokens"):
        assert [row[key] for row in two] == [row[key] for row in one]
    losses = [[row["loss"] for row in rows] for rows in (two, one)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    lines = [(tmp_path / name / "anomalies.jsonl").read_text() for name in ("two", "one")]
    assert lines[0].count('"not finite"') == lines[1].count('"not finite"') == 2
