"""Two processes of four devices are one process of eight: local.sh as a user starts it, and the
commands that read checkpoints."""

import json
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from safetensors.numpy import load_file, save_file

from deepseek_jax.train import loop

TINY = Path(__file__).parents[1] / "fixtures" / "hf_tiny"
MESH = {"replica": 2, "node": 2, "gpu": 2}


@pytest.mark.slow
def test_two_processes_are_one(text, tmp_path, monkeypatch, capsys):
    """A run of two processes, stopped by SIGTERM and ended on one device, equals a run on one."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    no_score = {"tokens": 0}
    alone = runs.tiny(text, evaluation=no_score)
    one, two = tmp_path / "one", tmp_path / "two"
    loop.train(alone, one, screen=False)

    quick_to_compile = {"capacity_factor": 100, "unroll": 1}
    shared = runs.tiny(text, mesh=MESH, layout=quick_to_compile, evaluation=no_score)
    slow = [*runs.arguments(shared, two), "--emulate_devices=4"]
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
    assert out.count("compiling") == 1  # only process 0 prints

    loop.train(alone, two)
    assert f"resumed from step {reached}" in capsys.readouterr().out
    np.testing.assert_allclose(runs.losses(two), runs.losses(one), rtol=1e-5)
    ours, theirs = runs.rows(two), runs.rows(one)
    assert [row["expert_load"] for row in ours] == [row["expert_load"] for row in theirs]


def pair(command, *flags):
    """(exit code, stdout, stderr) of both processes of a command, of two devices each."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    common = ["--config=configs/v3_tiny.py", "--emulate_devices=2"]
    common += [
        "--config.layout.unroll=1",
        "--config.layout.capacity_factor=100",
    ]  # quick to compile
    common += [f"--coordinator=localhost:{port}", "--processes=2", *map(str, flags)]
    module = [sys.executable, "-m", f"deepseek_jax.{command}"]
    started = [runs.start([*module, *common, f"--process={number}"]) for number in range(2)]
    try:
        told = [process.communicate(timeout=100) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *both) for process, both in zip(started, told, strict=True)]


COMMON = [f"--checkpoint={TINY}", "--mesh=node:2,gpu:2", "--json"]


@pytest.fixture
def expected():
    """Values of the fixture's model, as `transformers` computes them."""
    with np.load(TINY / "expected.npz") as values:
        return dict(values)


def test_generation_by_two_processes(expected):
    """Both processes call the programs and one prints."""
    flags = [f"--prompt_tokens={','.join(map(str, ids))}" for ids in expected["gen_prompt"]]
    first, second = pair("generate", *COMMON, *flags, "--max_tokens=8", "--temperature=0")
    assert second == (0, "", "") and (first[0], first[2]) == (0, "")
    found = [request["tokens"] for request in json.loads(first[1])["requests"]]
    np.testing.assert_array_equal(found, expected["gen_tokens"][:, :8])


@pytest.mark.slow
def test_scoring_by_two_processes(expected, tmp_path):
    np.save(tmp_path / "ids.npy", expected["input_ids"])
    data = f"--data={tmp_path / 'ids.npy'}"
    first, second = pair("evaluate", *COMMON, data, "--dtype=float32")
    assert second == (0, "", "") and (first[0], first[2]) == (0, "")
    assert json.loads(first[1])["loss"] == pytest.approx(float(expected["loss"]), abs=1e-5)


def test_what_one_process_cannot_read_ends_both(tmp_path):
    """Only the second process reads the experts of the second node."""
    name = "model.layers.3.mlp.experts.15.up_proj.weight"
    weights = {n: np.array(w) for n, w in load_file(TINY / "model.safetensors").items()}
    weights[name][0, 0] = np.nan
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copyfile(TINY / "config.json", tmp_path / "config.json")
    flags = [f"--checkpoint={tmp_path}", "--prompt_tokens=1,2", "--mesh=node:2,gpu:2"]
    for code, out, err in pair("generate", *flags):
        assert (code, out) == (2, "")
        assert f"error: {tmp_path}/model.safetensors: {name} holds 1 values of" in err, err
