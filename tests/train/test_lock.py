"""One live run in each workdir, and a run that sees when its workdir is gone."""

import errno
import json
import os
import shutil
import socket
import time

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.errors import RunError
from deepseek_jax.train import lock

HERE = socket.gethostname()


@pytest.fixture(params=["flock", "no flock"])
def kind(request, monkeypatch):
    """A file system with locks, and one without."""
    if request.param == "no flock":
        without_locks(monkeypatch)
    return request.param


def without_locks(monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", refused)
    monkeypatch.setattr(lock.time, "sleep", lambda _: None)


def test_a_second_run_is_refused_and_told_who_has_the_workdir(tmp_path, kind):
    run = tmp_path / "runs" / "one"
    with lock.held(run):
        signed = json.loads((run / ".lock").read_text())
        words = (
            rf"--workdir={run} is in use by process {os.getpid()} on {HERE} since "
            rf"{signed['since'][:10]}.*; wait for that run or stop it, or give another --workdir"
        )
        for _ in range(2):
            with pytest.raises(ConfigError, match=words), lock.held(run):
                pass
        assert [path.name for path in run.iterdir()] == [".lock"]
    with lock.held(run):  # the first one has ended
        pass
    assert list(tmp_path.iterdir()) == []  # no run was begun, so nothing is left


def test_folders_that_another_run_removes_at_its_end_are_made_again(tmp_path, monkeypatch):
    """It ends with nothing written, between the look at the folder and the lock in it."""
    run, try_once, tries = tmp_path / "runs" / "one", lock.Lock._try, []

    def without_folder(own):
        tries.append(run.is_dir())
        if len(tries) == 1:
            shutil.rmtree(run.parent)
        return try_once(own)

    monkeypatch.setattr(lock.Lock, "_try", without_folder)
    with lock.held(run):
        assert (run / ".lock").is_file() and tries == [True, True]
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_holds_a_run_stays(tmp_path):
    with lock.held(tmp_path / "run") as own:
        (own.directory / "config.json").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def sign(run, host=HERE, pid=0, age=0.0):
    """The lock of a run that was killed, or that runs on another host."""
    text = json.dumps(
        {"host": host, "pid": pid or os.getpid(), "since": "2026-11-01 10:00:00+00:00"}
    )
    (run / ".lock").write_text(text)
    os.utime(run / ".lock", times=(time.time() - age,) * 2)


def test_a_dead_run_s_lock_is_taken_over(tmp_path):
    sign(tmp_path, "elsewhere", age=1)
    with lock.held(tmp_path) as own:
        own.check()


@pytest.mark.parametrize(
    "holder, free",
    [
        (dict(pid=2**22 + 1), True),  # above every pid of Linux
        (dict(host="elsewhere", age=lock.STALE_SECONDS + 60), True),
        (dict(host="elsewhere", age=lock.BEAT_SECONDS), False),
        (dict(age=lock.STALE_SECONDS + 60), True),  # the same pid in another container
    ],
    ids=str,
)
def test_without_locks_a_sign_of_life_counts(tmp_path, monkeypatch, holder, free):
    without_locks(monkeypatch)
    sign(tmp_path, **holder)
    if free:
        with lock.held(tmp_path) as own:
            own.check()
        return
    with pytest.raises(ConfigError, match=r"in use by process \d+ on elsewhere since 2026-11-01"):
        lock.Lock(tmp_path).take()


def test_without_locks_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    touched = lock.threading.Event()
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.001)
    monkeypatch.setattr(lock.os, "utime", lambda _: touched.set())
    with lock.held(tmp_path):
        assert touched.wait(30)


def test_a_lock_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock.os, "pwrite", full)
    words = r"cannot be written \(No space left on device\)"
    with pytest.raises(ConfigError, match=words), lock.held(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


GONE = {
    "removed": lambda run: shutil.rmtree(run),
    "renamed": lambda run: run.rename(run.with_name("moved")),
    "replaced": lambda run: [shutil.rmtree(run), run.mkdir()],
    "a file": lambda run: [shutil.rmtree(run), run.touch()],
}


@pytest.mark.parametrize("accident", GONE)
def test_a_workdir_that_is_gone_is_seen_and_not_made_again(tmp_path, accident):
    run = tmp_path / "run"
    with lock.held(run) as own:
        (run / "config.json").touch()
        own.check()
        GONE[accident](run)
        after = sorted(tmp_path.rglob("*"))
        with pytest.raises(RunError, match=rf"--workdir={run} was removed, renamed or replaced"):
            own.check()
    assert sorted(tmp_path.rglob("*")) == after


def test_a_workdir_that_another_run_began_anew_is_not_written_to(tmp_path):
    with lock.held(tmp_path / "run") as own:
        (tmp_path / "run").rename(tmp_path / "moved")
        with lock.held(tmp_path / "run") as other:
            with pytest.raises(RunError, match="belongs to another run now"):
                own.check()
            own.release()
            other.check()  # its lock is not the one that was released
