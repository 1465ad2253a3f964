"""The state of a run from its files: fields, words, and what is not there yet."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import runs
from reports import row

from deepseek_jax.train import run_files, status_metrics, status_screen

NOW = 1_800_000_000.0


def write(path, value, age=0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    os.utime(path, (NOW - age, NOW - age))


def process(number, step, since, **more):
    return {
        "process": number, "processes": 3, "host": f"n{number}", "pid": 1, "attempt": 2,
        "section": "step", "step": step, "time": NOW - since, "median_step_seconds": 0.5 + number,
        "beat": NOW - 1.0, **more,
    }  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
    """A run of three processes after 40 steps, one of which is behind."""
    run = tmp_path / "run"
    config = {"schedule": {"tokens": 1000}, "checkpoint": {"every_steps": 20}, "log": {}}
    write(run / "config.json", config)
    load = [[1 / 8] * 8, [0.01, 0.29, *[0.7 / 6] * 6], [1 / 8] * 8]
    system = {"tokens_per_second": 5.0, "step_seconds": 2.0, "skipped_steps": 2, "rewinds": 1}
    rows = [
        {**row(n, expert_load=load), "tokens": 10 * n, "dispatch_rounds": [1.0, 1.5], **system}
        for n in range(1, 41)
    ]
    write(run / "metrics.jsonl", "".join(json.dumps(each) + "\n" for each in rows), age=7.0)
    (run / "checkpoints" / "20").mkdir(parents=True)
    (run / "checkpoints" / "40.broken").mkdir()
    (run / "checkpoints" / "60.orbax-checkpoint-tmp").mkdir()
    os.utime(run / "checkpoints" / "20", (NOW - 300, NOW - 300))
    for number, step, since in ((0, 41, 2), (1, 40, 50), (2, 41, 1)):
        write(run / "progress" / f"process_{number}.json", process(number, step, since))
    write(run / "progress" / "process_3.json", process(3, 9, 9000, attempt=1))
    write(run / "progress" / "restarts.json", {"attempt": 2})
    last = {"step": 30, "tokens": 300, "sequences": [0, 7], "kind": "loss spike"}
    write(run / "anomalies.jsonl", json.dumps({**last, "action": "skipped"}) + "\n")
    write(run / ".lock", {"host": "elsewhere", "pid": 4, "since": "2026-11-01"})
    return run


def test_a_run_is_told_in_numbers(workdir):
    found = run_files.status(workdir, NOW)
    assert found["state"] == "training" and found["holder"]["host"] == "elsewhere"
    assert (found["step"], found["tokens"], found["total_tokens"]) == (40, 400, 1000)
    assert (found["share"], found["seconds_left"]) == (0.4, 120.0)
    assert len(found["losses"]) == 40 and found["losses"][-1] == [40, found["loss"]]
    assert (found["worst_layer"], found["idle_experts"], found["experts"]) == (1, 1, 24)
    assert max(found["worst_layer_load"]) == 2.32 and found["dispatch_rounds"] == 1.5
    assert found["processes"] == {
        "expected": 3, "seen": 3, "median_step_seconds": 1.5, "newest_beat_seconds": 1.0,
        "slowest": {
            "process": 1, "host": "n1", "section": "step", "step": 40,
            "median_step_seconds": 1.5, "seconds": 50.0,
        },
    }  # fmt: skip
    assert found["checkpoint"] == {
        "step": 20, "age_seconds": 300.0, "every_steps": 20, "set_aside": ["40.broken"],
    }  # fmt: skip
    assert (found["restarts"], found["anomalies"], found["skipped_steps"]) == (2, 1, 2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_run_is_told_in_words(workdir):
    told = dict(status_screen.lines(run_files.status(workdir, NOW), 80))
    assert told["step"] == "40, 400 of 1,000 tokens, 40.0%, 2 min left"
    assert told["processes"] == (
        "3 of 3, furthest behind: 1 on n1, step, step 40, for 50 s, median 1.5 s a step"
    )
    assert told["checkpoint"] == "step 20, 5 min ago, due every 20 steps, set aside: 40.broken"
    assert told["anomalies"] == (
        "1, 2 steps skipped, 1 rewinds, last: loss spike at step 30, skipped"
    )
    assert told["MoE layer 2"] == status_screen.strip([0.08, 2.32, *[0.9333] * 6], 64, low=0.0)


def test_words_for_a_run(workdir):
    def state():
        return run_files.status(workdir, NOW)["state"]

    for number in (0, 1, 2):
        write(
            workdir / "progress" / f"process_{number}.json", process(number, 4, 900, beat=NOW - 400)
        )
    assert state() == "training"  # its row is young
    os.utime(workdir / "metrics.jsonl", (NOW - 500, NOW - 500))
    assert state() == "silent"
    here = socket.gethostname()
    write(workdir / ".lock", {"host": here, "pid": 2**22 + 1, "since": "2026-11-01"})
    assert state() == "killed"
    write(workdir / ".lock", {"host": here, "pid": os.getpid(), "since": "2026-11-01"})
    assert state() == "silent"
    (workdir / ".lock").unlink()
    assert state() == "stopped"
    write(workdir / "summary.json", {"step": 40, "held_out_bits_per_byte": 2.5})
    assert state() == "finished"
    assert dict(status_screen.lines(run_files.status(workdir, NOW)))["held-out"].startswith("2.5")


def test_a_run_that_compiles_has_no_row(workdir):
    write(workdir / "metrics.jsonl", "", age=3.0)
    found = run_files.status(workdir, NOW)
    assert (found["state"], found["row_age_seconds"]) == ("starting", None)
    assert dict(status_screen.lines(found))["last row"] == "none yet"
    assert status_metrics.values(found)["running"][1] == 1


def test_the_screen_cuts_no_line(workdir, capsys):
    from rich.console import Console

    found = run_files.status(workdir, NOW)
    Console(width=60).print(status_screen.screen(found, 60))
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("processes", "anomalies", "checkpoint"):
        assert dict(status_screen.lines(found, 60))[name] in shown


def test_nothing_and_damage_are_told(tmp_path, workdir):
    empty = run_files.status(tmp_path, NOW)
    assert empty["state"] == "empty" and empty["step"] is None and empty["restarts"] is None
    assert dict(status_screen.lines(empty))["checkpoint"] == "none yet"
    for path in workdir.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\xff{")
    damaged = run_files.status(workdir, NOW)
    assert damaged["step"] == 20 and damaged["processes"]["seen"] == 0
    assert list(status_screen.lines(damaged))


@pytest.mark.parametrize(
    "name, text",
    [
        ("metrics.jsonl", '{"step": 1, "tokens": NaN, "loss": NaN, "tokens_per_second": 1e999}'),
        ("metrics.jsonl", '{"step": 1, "loss": "a", "expert_load": [["a"], []], "rewinds": {}}'),
        ("metrics.jsonl", '{"step": 1, "expert_load": [[NaN, 0.5]], "dispatch_rounds": [NaN]}'),
        ("metrics.jsonl", '{"step": 1, "expert_load": 3, "dispatch_rounds": 3, "mfu": true}'),
        ("config.json", '{"schedule": null, "log": [], "checkpoint": {"every_steps": "a"}}'),
        ("progress/process_9.json", '{"process": 9, "attempt": 3, "beat": NaN, "time": "a"}'),
        ("progress/restarts.json", '{"attempt": NaN}'),
        ("anomalies.jsonl", '{"step": 1, "tokens": 2, "sequences": [], "kind": 3, "loss": NaN}'),
        ("anomalies.jsonl", '{"step": null, "tokens": 2, "sequences": [], "kind": "a"}'),
        ("summary.json", '{"step": "a", "held_out_bits_per_byte": NaN}'),
        (".lock", '{"pid": NaN}'),
        ("metrics.jsonl", "[" * 2000),
        ("checkpoints/\u00b2/file", ""),
    ],
)
def test_what_is_no_number_is_told_as_not_known(workdir, name, text):
    whole = run_files.status(workdir, NOW)
    write(workdir / name, text + "\n")
    found = run_files.status(workdir, NOW)
    assert found.keys() == whole.keys()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert dict(status_screen.lines(found))["checkpoint"].startswith("step 20, ")
    assert status_metrics.values(found)["checkpoint_step"][1] == 20


def test_only_the_end_of_the_rows_is_read(workdir, monkeypatch):
    whole = run_files.tail(workdir / "metrics.jsonl")
    some = run_files.tail(workdir / "metrics.jsonl", 3000)
    assert 0 < len(some) < len(whole) and some == whole[-len(some) :]


def test_a_strip_shows_peaks():
    assert status_screen.strip([0.0, 1.0, 0.5], 10) == "▁█▅"
    many = [0.0] * 1000
    many[777] = 1.0
    assert status_screen.strip(many, 10) == "▁▁▁▁▁▁▁█▁▁"


def test_gauges_for_prometheus(workdir, tmp_path):
    pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    status_metrics.write(run_files.status(workdir, NOW), tmp_path / "run.prom")
    families = text_string_to_metric_families((tmp_path / "run.prom").read_text())
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["workdir"] for sample in samples} == {str(workdir)}
    values = {sample.name.removeprefix("deepseek_jax_"): sample.value for sample in samples}
    assert values["step"] == 40 and values["running"] == 1 and values["checkpoint_step"] == 20
    assert values["slowest_seconds"] == 50 and "mfu" not in values


def test_without_a_terminal_gauges_are_written_until_a_signal(workdir, tmp_path):
    pytest.importorskip("prometheus_client")
    file = tmp_path / "run.prom"
    watch = [sys.executable, "-m", "deepseek_jax.watch", f"--workdir={workdir}", "--every=0.1"]
    service = subprocess.Popen(
        [*watch, f"--prometheus={file}"], cwd=runs.ROOT, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    for _ in range(3):
        while not file.exists():
            assert service.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        file.unlink()
    service.terminate()
    assert service.communicate(timeout=20)[0].count("last row") == 1
    refused = subprocess.run(
        [*watch, f"--prometheus={tmp_path}/run.txt"], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "ends with .prom" in refused.stderr


def test_the_command_begins_soon_and_without_jax(workdir):
    os.utime(workdir / "metrics.jsonl")

    def watch(*flags):
        command = [sys.executable, "-X", "importtime", "-m", "deepseek_jax.watch", *flags]
        return subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=60)

    began = time.monotonic()
    ran = watch(f"--workdir={workdir}", "--json")
    seconds = time.monotonic() - began
    assert ran.returncode == 0 and json.loads(ran.stdout)["step"] == 40
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "deepseek_jax.train.run_files" in imported
    assert not imported & {"jax", "flax", "orbax", "matplotlib"}
    assert seconds < 10  # 0.6 s on two idle cores
    screen = watch(f"--workdir={workdir}", "--once").stdout
    assert "furthest behind: 1 on n1" in screen
    refused = watch(f"--workdir={workdir}/nothing")
    assert refused.returncode == 2 and "is not a folder" in refused.stderr.splitlines()[-1]
