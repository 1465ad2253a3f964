"""Two processes, one of which hangs, and which are stopped, end with the losses of one process.

`faulty_runs.py` tries every signal in every process at every section.
"""

import json
import os
import re
import signal
import time

import faulty_runs
import numpy as np
import pytest
import runs

from deepseek_jax.train import loop


def config_of(text, **mesh):
    """A run of a layer of experts, with an average of the weights.

    Each token goes to all experts, so that rounding cannot change the choice of them.
    """
    every = {"experts": 4, "top_k": 4, "groups": 2, "top_groups": 2}
    return runs.tiny(
        text,
        mesh=mesh,
        model={"layers": 1, "dense_layers": 0, "mtp_depth": 0, **every},
        schedule={"tokens": 8000},
        layout={"capacity_factor": 100, "unroll": 1},  # quick to compile
        evaluation={"tokens": 0},
        deadlines={"step": 8},
    )


def test_a_run_that_hangs_and_is_stopped_ends_with_the_same_losses(
    text, tmp_path, one_device, capsys
):
    """Process 0, the coordinator, stops in step 7; all start again, until SIGTERM comes.

    One process on one device goes on from there.
    """
    two, one, note = tmp_path / "two", tmp_path / "one", tmp_path / "note"
    fault = faulty_runs.Fault("SIGSTOP", "step", 0, 2, step=7)
    programs = os.environ.get("JAX_COMPILATION_CACHE_DIR", tmp_path)
    launched = runs.start(
        [
            str(runs.ROOT / "launch/local.sh"),
            "2",
            *runs.arguments(config_of(text, gpu=2), two),
            "--emulate_devices=1",
        ],
        **faulty_runs.environment(fault, note, programs, keep=True),
    )
    try:
        while launched.poll() is None and not (note.exists() and restarted(two)):
            time.sleep(0.02)
        launched.send_signal(signal.SIGTERM)
        out, err = launched.communicate(timeout=200)
    finally:
        launched.terminate()
    assert launched.returncode == 0, err
    *_, started, named = err.splitlines()
    assert started == "local.sh: a process ended with code 76; all start again (1)"
    assert re.match("error: process 1: section step, step [78], took more than 8 s", named)
    assert "process 0 (pid " in named and "no sign of life" in named
    assert "to_the_end" in (two / "stacks" / "process_1_attempt_0.txt").read_text()
    restarts = json.loads((two / "progress" / "restarts.json").read_text())
    assert (restarts["attempt"], restarts["code"]) == (1, 0)
    assert out.count("compiling") == 2  # once in each attempt: only process 0 prints
    assert "Gloo" not in out
    reached = len(runs.losses(two))
    assert reached >= 7 and runs.checkpoints(two)[-1] == reached

    loop.train(config_of(text, gpu=1), two)
    assert f"resumed from step {reached}" in capsys.readouterr().out
    loop.train(config_of(text, gpu=1), one, screen=False)
    np.testing.assert_allclose(runs.losses(two), runs.losses(one), rtol=1e-5)


def restarted(workdir):
    """Whether the second attempt has logged a step."""
    attempt = workdir / "progress" / "restarts.json"
    return json.loads(attempt.read_text())["attempt"] == 1 and len(runs.rows(workdir)) >= 7


@pytest.mark.slow
@pytest.mark.parametrize("fault", faulty_runs.all_faults(2), ids=str)
def test_every_fault_of_two_processes(fault, text, tmp_path):
    broken, outcome = faulty_runs.try_out(fault, text, tmp_path / "fault")
    assert not broken, outcome.texts
