"""The launch scripts: local.sh with a fake `python`, the others by their linters."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"

# Fake `python`: records its arguments and signals, then behaves as PEER_0, PEER_1 and so on
# say for its process number.
FAKE_PYTHON = """#!/usr/bin/env bash
for argument in "$@"; do [[ $argument == --process=* ]] && rank=${argument#--process=}; done
printf '%s\\n' "$@" > "$NOTES/$rank.args"
trap 'echo TERM > "$NOTES/$rank.signal"; exit "${ENDS_WITH:-0}"' TERM
trap 'echo INT > "$NOTES/$rank.signal"; exit "${ENDS_WITH:-0}"' INT
echo "process $rank speaking"
act=PEER_$rank
eval "${!act:-:}"
"""


class Script:
    """local.sh on a PATH where `python` is the fake."""

    def __init__(self, folder: Path):
        self.notes = folder / "notes"
        self.logs = folder / "logs"
        binaries = folder / "bin"
        for path in (self.notes, self.logs, binaries):
            path.mkdir()
        (binaries / "python").write_text(FAKE_PYTHON)
        (binaries / "python").chmod(0o755)
        path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path} | {
            "NOTES": str(self.notes),
            "RESTARTS": "0",
            "TMPDIR": str(self.logs),
        }

    def start(self, *arguments: str, **peers: str) -> subprocess.Popen:
        return subprocess.Popen(
            [str(LAUNCH / "local.sh"), *arguments],
            env=self.environment | peers,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests that run in the background inherit an ignored SIGINT, which bash cannot trap.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def start_two(self, peer_0: str, peer_1: str, code: int) -> subprocess.Popen:
        """Processes that end with a code after a signal; both are ready once this returns."""
        running = self.start("2", PEER_0=peer_0, PEER_1=peer_1, ENDS_WITH=str(code))
        deadline = time.monotonic() + 20
        while len(list(self.notes.glob("*.ready"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return running

    def run(self, *arguments: str, **peers: str) -> tuple[int, str, str]:
        script = self.start(*arguments, **peers)
        out, err = script.communicate(timeout=30)
        return script.returncode, out, err

    def arguments(self, rank: int) -> list[str]:
        return (self.notes / f"{rank}.args").read_text().splitlines()


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


def test_every_process_gets_its_place_and_the_arguments(script):
    code, out, err = script.run("3", "--config=some file.py", "--emulate_devices=4")
    assert (code, out, err) == (0, "process 0 speaking\n", "")
    coordinators = set()
    for rank in range(3):
        arguments = script.arguments(rank)
        assert arguments[:2] == ["-m", "deepseek_jax.main"]
        assert {"--config=some file.py", "--emulate_devices=4"} <= set(arguments)
        assert {"--processes=3", f"--process={rank}"} <= set(arguments)
        coordinators |= {a for a in arguments if a.startswith("--coordinator=")}
    [coordinator] = coordinators
    assert re.fullmatch(r"--coordinator=localhost:\d+", coordinator)
    assert list(script.logs.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("0",), ("two",), ("--config=x",)])
def test_without_a_number_of_processes_it_explains_itself(script, arguments):
    code, out, err = script.run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: launch/local.sh N")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_process_stops_the_others_with_its_code(script, rank):
    forever = "touch $NOTES/$rank.ready; while :; do sleep 0.05; done"
    others = {f"PEER_{other}": forever for other in range(3)}
    fails = (
        'until [[ $(ls "$NOTES") == *ready*ready* ]]; do sleep 0.05; done; echo my reason; exit 7'
    )
    code, _, err = script.run("3", **others | {f"PEER_{rank}": fails})
    assert code == 7
    for other in {0, 1, 2} - {rank}:
        assert (script.notes / f"{other}.signal").read_text() == "TERM\n"
    assert ("my reason" in err) == (rank == 1)  # process 0 prints its own output
    assert "process 2 speaking" in err


def test_a_killed_process_counts_as_failed(script):
    code, _, _ = script.run("2", PEER_0="while :; do sleep 0.05; done", PEER_1="kill -9 $$")
    assert code == 137
    assert (script.notes / "0.signal").read_text() == "TERM\n"


FAILS_TWICE = "touch $NOTES/$rank.$$; [[ $(ls $NOTES/$rank.*[0-9] | wc -l) -gt 2 ]] || "


@pytest.mark.parametrize("end", ["kill -9 $$", "exit 76"])
def test_after_a_lost_or_a_hanging_process_all_start_again(script, end):
    code, out, err = script.run("2", PEER_1=FAILS_TWICE + end, RESTARTS="5")
    assert code == 0
    assert out.count("process 0 speaking") == 3
    assert err.count("all start again") == 2
    assert list(script.logs.iterdir()) == []


@pytest.mark.parametrize("code", [1, 2, 130])
def test_other_ends_start_nothing_again(script, code):
    found, out, err = script.run("2", PEER_1=f"exit {code}", RESTARTS="5")
    assert found == code
    assert out.count("process 0 speaking") == 1 and "start again" not in err


def test_starts_are_not_endless_and_each_has_a_port_of_its_own(script):
    keep = "cp $NOTES/0.args $NOTES/$$.port; exit 76"
    code, out, _ = script.run("1", PEER_0=keep, RESTARTS="2")
    assert (code, out.count("speaking")) == (76, 3)
    ports = {re.search(r"--coordinator=\S+", p.read_text())[0] for p in script.notes.glob("*.port")}
    assert len(ports) == 3


@pytest.mark.parametrize("name, code", [("TERM", 0), ("INT", 0), ("TERM", 75), ("INT", 130)])
def test_signals_reach_all_and_a_clean_stop_is_no_failure(script, name, code):
    forever = "touch $NOTES/$rank.ready; while :; do sleep 0.05; done"
    running = script.start_two(forever, forever, code)
    running.send_signal(signal.Signals[f"SIG{name}"])
    _, err = running.communicate(timeout=20)
    assert (running.returncode, err) == (code, "")
    assert [(script.notes / f"{rank}.signal").read_text() for rank in (0, 1)] == [f"{name}\n"] * 2


@pytest.mark.parametrize("code", [76, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_stands_still_does_not_keep_a_signal_waiting(script, code):
    """The others end with 76 where they miss it in a step, with 0 where nothing is saved yet."""
    forever = "touch $NOTES/$rank.ready; while :; do sleep 0.05; done"
    stands = "touch $NOTES/$rank.ready; kill -STOP $$"
    running = script.start_two(forever, stands, code)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=20 if code else 120)
    assert running.returncode == code
    assert (script.notes / "1.signal").read_text() == "TERM\n"


def installed(command: str) -> str:
    """The linter beside this Python or on the PATH."""
    beside = Path(sys.executable).with_name(command)
    found = str(beside) if beside.exists() else shutil.which(command)
    if not found:
        pytest.skip(f"{command} is not installed; the dev extra brings it")
    return found


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch"])
def test_shell_scripts_pass_shellcheck(name):
    check = subprocess.run(
        [installed("shellcheck"), str(LAUNCH / name)], capture_output=True, text=True
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_kubernetes_manifest_is_valid():
    check = subprocess.run(
        [installed("kubernetes-validate"), "--strict", str(LAUNCH / "kubernetes.yaml")],
        capture_output=True,
        text=True,
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_slurm_options_come_before_the_first_command():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--nodes=256", "--gpus-per-node=8", "--requeue", "--signal=TERM@300"} <= options
    first = next(i for i, line in enumerate(lines) if line and line[0] != "#")
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


@pytest.mark.parametrize(
    ("code", "starts", "requeued"),
    [(0, 0, False), (75, 0, True), (76, 3, True), (137, 0, True), (1, 0, False), (2, 0, False),
     (76, 100, False)],
)  # fmt: skip
def test_slurm_puts_a_stopped_or_lost_run_back_in_the_queue(tmp_path, code, starts, requeued):
    fake_srun = f'echo "$@"; echo port $JAX_COORDINATOR_PORT; exit {code}'
    for name, body in {"srun": fake_srun, "scontrol": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42"}
    slurm |= {"SLURM_RESTART_COUNT": str(starts)} if starts else {}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    job = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "--config=x"],
        env={**os.environ, **slurm, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert job.returncode == code
    started, port, *queue = job.stdout.splitlines()
    command = "python -m deepseek_jax.main --stop_code=75 --config=x"
    assert started == f"--kill-on-bad-exit=0 --wait=90 {command}"
    assert port == f"port {20000 + 42 * 101 + starts}"
    assert queue == (["requeue 42"] if requeued else [])
    assert ("MAX_REQUEUES" in job.stderr) == (starts == 100)
