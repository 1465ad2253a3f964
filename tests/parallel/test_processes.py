"""Two processes of four devices are one process of eight: local.sh as a user starts it."""

import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
import runs

MESH = {"replica": 2, "node": 2, "gpu": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = "the loss of a token is what the next one costs when it surprises us".split()  # noqa: SIM905
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(" ".join(rng.choice(words, 120)))
    return folder


def test_two_processes_are_one(text, tmp_path):
    """Stopped by SIGTERM as two processes, ended by one; and all of it by one alone."""
    config = runs.tiny(text, mesh=MESH)
    one, two = tmp_path / "one", tmp_path / "two"
    whole = runs.start_main([*runs.arguments(config, one), "--emulate_devices=8"])
    _, err = whole.communicate(timeout=200)
    assert (whole.returncode, err) == (0, "")

    slow = [*runs.arguments(config, two), "--emulate_devices=4"]
    launched = runs.start([str(runs.ROOT / "launch/local.sh"), "2", *slow])
    try:
        while launched.poll() is None and len(runs.rows(two)) < 2:
            time.sleep(0.02)
        launched.send_signal(signal.SIGTERM)
        out, _ = launched.communicate(timeout=200)
    finally:
        launched.terminate()
    assert launched.returncode == 0 and "Gloo" not in out
    reached = len(runs.losses(two))
    assert reached >= 2 and runs.checkpoints(two)[-1] == reached
    assert out.count("compiling") == 1  # the other process does not speak

    rest = runs.start_main([*runs.arguments(config, two), "--emulate_devices=8"])
    out, err = rest.communicate(timeout=200)
    assert (rest.returncode, err) == (0, "") and f"resumed from step {reached}" in out
    np.testing.assert_allclose(runs.losses(two), runs.losses(one), rtol=1e-5)
    ours, theirs = runs.rows(two), runs.rows(one)
    assert [row["expert_load"] for row in ours] == [row["expert_load"] for row in theirs]
