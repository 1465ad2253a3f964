"""A process that hangs in the middle of a run: named, ended, started again, to the same losses.

`faulty_runs.py` tries every signal in every process at every section.
"""

import json
import subprocess

import faulty_runs
import jax
import numpy as np
import pytest
import runs

from deepseek_jax.train import loop


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.documents(tmp_path_factory.mktemp("corpus") / "text")


def config_of(text, **mesh):
    """The config of the flags of `faulty_runs`, for a run in this process."""
    sections: dict[str, dict] = {"mesh": mesh, "evaluation": {"tokens": 0}}
    for key, value in faulty_runs.SETTINGS.items():
        section, name = key.split(".")
        if section != "mesh":
            sections.setdefault(section, {})[name] = value
    return runs.tiny(text, **sections)


def test_a_run_whose_process_0_hangs_ends_with_the_same_losses(text, tmp_path, monkeypatch):
    """Process 0, the coordinator, stops in step 4; and all start again."""
    two, one, note = tmp_path / "two", tmp_path / "one", tmp_path / "note"
    fault = faulty_runs.Fault("SIGSTOP", "step", 0, 2)
    command = [str(runs.ROOT / "launch/local.sh"), "2"]
    done = subprocess.run(
        [*command, *faulty_runs.flags(text, two, deadlines__step=8)],
        env=faulty_runs.environment(fault, note),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert note.exists()
    *_, started, named = done.stderr.splitlines()
    assert started == "local.sh: a process ended with code 76; all start again (1)"
    assert named.startswith("error: process 1: section step, step 4, took more than 8 s")
    assert "process 0 (pid " in named and "no sign of life" in named
    assert "to_the_end" in (two / "stacks" / "process_1_attempt_0.txt").read_text()
    restarts = json.loads((two / "progress" / "restarts.json").read_text())
    assert (restarts["attempt"], restarts["code"]) == (1, 0)

    monkeypatch.setattr(jax, "device_count", lambda: 1)
    loop.train(config_of(text, gpu=1), one, screen=False)
    np.testing.assert_allclose(runs.losses(two), runs.losses(one), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fault", faulty_runs.all_faults(2), ids=str)
def test_every_fault_of_two_processes(fault, text, tmp_path):
    broken, outcome = faulty_runs.try_out(fault, text, tmp_path / "fault")
    assert not broken, outcome.texts
