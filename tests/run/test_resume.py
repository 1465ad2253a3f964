"""Runs that are stopped, killed or moved to another mesh resume exactly."""

import json
import shutil
import signal
import time

import numpy as np
import pytest
import runs

from deepseek_jax.train import loop

SYSTEM = {
    "tokens_per_second", "step_seconds", "data_seconds", "idle_share", "model_flops_per_second",
}  # fmt: skip
KEYS = SYSTEM | {
    "step", "tokens", "loss", "mtp_loss", "grad_norm", "learning_rate",
    "max_violation", "expert_load", "mtp_weight", "bias_speed", "sequences",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """(workdir, what was printed) of a run on one device that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    process = runs.start_main(runs.arguments(runs.tiny(text), workdir))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    return workdir, out


@pytest.mark.smoke
def test_a_run_leaves_what_it_promises(whole):
    workdir, out = whole
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "tokenizer.json",
        "loss.png", "expert_load.png", "summary.json", "progress",
    }  # fmt: skip
    rows = runs.rows(workdir)
    assert all(row.keys() >= KEYS for row in rows)
    assert len(rows) == len(runs.losses(workdir)) and rows[-1]["tokens"] >= 20 * 512
    # Everything that a resumed run has to restore changes inside this run.
    for key in ("sequences", "learning_rate", "mtp_weight", "bias_speed"):
        assert len({row[key] for row in rows}) > 1, key
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert runs.checkpoints(workdir)[-1] == len(rows)
    # A CPU has neither a published peak nor memory statistics.
    assert not any(row.keys() & {"mfu", "device_bytes_in_use", "device_bytes_peak"} for row in rows)
    assert [row["step"] for row in rows if "compile_seconds" in row] == [1]
    assert all(0 <= row["idle_share"] <= 1 for row in rows)
    assert rows[0]["compile_seconds"] > rows[1]["step_seconds"] > rows[1]["data_seconds"] > 0
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary.keys() >= SYSTEM | {"compile_seconds", "step", "tokens", "stopped"}
    # No row includes the time of compiling, which is far longer than that of a thousand tokens.
    assert min(row["tokens_per_second"] for row in rows) > 256
    assert "compiling" in out and "held-out" in out and "gzip -9" in out
    assert len(out.splitlines()) < 12


def test_nothing_left_to_train_only_scores_again(whole, text):
    workdir, _ = whole
    metrics, before = (workdir / "metrics.jsonl").read_bytes(), runs.bits(workdir)
    process = runs.start_main(runs.arguments(runs.tiny(text), workdir))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "resumed from step" in out and "held-out" in out and "compiling" not in out
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    assert not json.loads((workdir / "summary.json").read_text()).keys() & SYSTEM
    assert runs.bits(workdir) == before


def wait_for(process, workdir, step, saved=0):
    """Until a process has logged `step` and so many checkpoints are there, or it has ended."""
    deadline = time.monotonic() + 90

    def reached():
        return len(runs.rows(workdir)) >= step and len(runs.checkpoints(workdir)) >= saved

    while process.poll() is None and not reached():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_and_stopped_it_ends_the_same(whole, text, tmp_path):
    """kill -9 right after a step, which as the fourth is being saved; SIGTERM, which saves; and
    that newest checkpoint is damaged."""
    workdir = tmp_path / "run"
    flags = runs.arguments(runs.tiny(text), workdir)
    process = runs.start_main(flags)
    wait_for(process, workdir, 9, 1)
    process.kill()
    process.communicate()
    process = runs.start_main([*flags, "--stop_code=75"])
    wait_for(process, workdir, 14, 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    reached = len(runs.rows(workdir))
    assert (process.returncode, err) == (75, "") and f"stopped after step {reached}" in out
    assert "resumed from step" in out
    assert runs.checkpoints(workdir)[-1] == reached < len(runs.losses(whole[0]))
    newest = workdir / "checkpoints" / str(reached)
    (newest / "state" / "_METADATA").unlink()
    process = runs.start_main(flags)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    [said] = err.splitlines()
    assert f"{newest} cannot be read, trying an older one" in said
    assert "resumed from step" in out
    np.testing.assert_array_equal(runs.losses(workdir), runs.losses(whole[0]))
    assert runs.bits(workdir) == runs.bits(whole[0])


def test_a_checkpoint_goes_on_on_another_mesh(whole, text, tmp_path):
    """A checkpoint of one device, from the middle of its run, resumes on another mesh."""
    run = shutil.copytree(whole[0], tmp_path / "run")
    kept, *later = runs.checkpoints(run)
    for step in later:
        shutil.rmtree(run / "checkpoints" / str(step))
    mesh, quick = {"pipe": 2, "node": 2, "gpu": 2}, {"capacity_factor": 100, "unroll": 1}
    loop.train(runs.tiny(text, mesh=mesh, layout=quick), run, screen=False)
    got, want = runs.losses(run), runs.losses(whole[0])
    assert kept < len(want) - 5
    np.testing.assert_array_equal(got[:kept], want[:kept])
    np.testing.assert_allclose(got[kept:, :2], want[kept:, :2], rtol=1e-5)
    ours, theirs = (runs.rows(folder)[kept:] for folder in (run, whole[0]))
    assert [row["expert_load"] for row in ours] == [row["expert_load"] for row in theirs]


@pytest.mark.slow
def test_muon_goes_on_with_its_momentum(text, tmp_path, one_device):
    config = runs.tiny(text, optimizer={"name": "muon"})
    loop.train(config, tmp_path / "whole", screen=False)
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    kept, *later = runs.checkpoints(run)
    for step in later:
        shutil.rmtree(run / "checkpoints" / str(step))
    loop.train(config, run, screen=False)
    assert kept < len(runs.losses(run)) - 5
    np.testing.assert_array_equal(runs.losses(run), runs.losses(tmp_path / "whole"))
    assert runs.bits(run) == runs.bits(tmp_path / "whole")
    assert runs.losses(run)[-1, 0] < runs.losses(run)[0, 0] - 1
