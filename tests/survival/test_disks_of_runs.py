"""Real processes on a disk that is full, read-only or gone for a while; needs root, for mounts."""

import contextlib
import os
import subprocess
import time

import numpy as np
import pytest
import runs

pytestmark = pytest.mark.slow
ROWS = 8


@pytest.fixture
def disk(tmp_path):
    """A file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield path
    subprocess.run(["umount", "--recursive", "--lazy", str(path)], check=True)


def remount(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


@contextlib.contextmanager
def filled(disk):
    """No room on the disk, which a file takes."""
    with (disk / "filler").open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    yield
    (disk / "filler").unlink()


def config(text, rule):
    """Steps enough to be disturbed; every tenth is saved."""
    return runs.tiny(
        text,
        batch={"sequences": ROWS, "ramp_sequences": ROWS, "micro_sequences": ROWS},
        schedule={"tokens": 120 * ROWS * 32},
        checkpoint={"every_steps": 10, "on_failure": rule},
        evaluation={"tokens": 0},
        optimizer={"ema_decay": 0.0},
    )


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    process = runs.start_main(runs.arguments(config(text, "stop"), workdir))
    _, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "")
    return workdir


def wait(process, reached):
    deadline = time.monotonic() + 150
    while process.poll() is None and not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def same(workdir, whole):
    np.testing.assert_array_equal(runs.losses(workdir), runs.losses(whole))
    assert runs.bits(workdir) == runs.bits(whole)


def went_on(flags, workdir, whole):
    process = runs.start_main(flags)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "") and "resumed from step" in out
    same(workdir, whole)


def first_checkpoint(workdir):
    return lambda: bool(runs.checkpoints(workdir))


def test_a_full_disk_stops_the_run_and_loses_nothing(text, disk, whole):
    flags = runs.arguments(config(text, "stop"), disk / "run")
    process = runs.start_main(flags)
    wait(process, first_checkpoint(disk / "run"))
    with filled(disk):
        _, err = process.communicate(timeout=150)
    kept = runs.checkpoints(disk / "run")[-1]
    assert process.returncode == 1
    last = err.splitlines()[-1]
    assert "cannot be written (No space left on device" in last
    assert f"the newest checkpoint is step {kept}, from which the same command goes on" in last
    went_on(flags, disk / "run", whole)


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint(text, disk, whole):
    process = runs.start_main(runs.arguments(config(text, "continue"), disk / "run"))
    wait(process, first_checkpoint(disk / "run"))
    with filled(disk):
        before = len(runs.rows(disk / "run"))
        time.sleep(0.2)
        wait(process, lambda: not list((disk / "run" / "checkpoints").glob("*tmp*")))
        time.sleep(2)
    _, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert "Training goes on; a checkpoint is due every 10 steps" in err
    assert before < 120 and runs.checkpoints(disk / "run")[-1] == 120
    same(disk / "run", whole)


def test_a_disk_that_becomes_read_only_stops_the_run_and_loses_nothing(text, disk, whole):
    """That of the checkpoints: the kernel refuses it while a file is open for writing."""
    checkpoints = disk / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(checkpoints)]
    subprocess.run(mount, check=True)
    flags = runs.arguments(config(text, "stop"), disk / "run")
    process = runs.start_main(flags)
    wait(process, first_checkpoint(disk / "run"))
    read_only = ["mount", "-o", "remount,ro", str(checkpoints)]
    while subprocess.run(read_only, capture_output=True).returncode:
        assert process.poll() is None
    _, err = process.communicate(timeout=150)
    remount(checkpoints, "rw")
    assert process.returncode == 1
    assert "cannot be written (Read-only file system). Make it writable" in err.splitlines()[-1]
    went_on(flags, disk / "run", whole)


def test_a_disk_that_is_gone_stops_the_run(text, disk, whole):
    flags = runs.arguments(config(text, "continue"), disk / "run")
    process = runs.start_main(flags)
    wait(process, first_checkpoint(disk / "run"))
    (disk / "run").rename(disk / "elsewhere")
    _, err = process.communicate(timeout=150)
    assert process.returncode == 1
    assert "was removed, renamed or replaced while this run went on" in err.splitlines()[-1]
    assert not (disk / "run").exists()
    (disk / "elsewhere").rename(disk / "run")
    went_on(flags, disk / "run", whole)
