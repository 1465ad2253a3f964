"""The process that the others wait for, named from files of progress."""

import dataclasses
import os
import socket
import subprocess
import sys
import time

import pytest

from deepseek_jax.errors import AGAIN
from deepseek_jax.runtime import progress, suspects


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Writes the files of a run of four, seen by process 0 in step 12."""
    mine = progress.begin(0, 4)
    mine.dispatched(11)
    mine.done()
    mine.dispatched(12)
    monkeypatch.setattr(progress, "interval", lambda processes: 0.1)
    mine.attach(tmp_path, 3)

    def write(number: int, *, age: float = 0.0, **values: object) -> None:
        host = {"host": "node7", "pid": 1000 + number}
        told = dataclasses.replace(mine.now, process=number, **host | values)
        path = tmp_path / progress.FOLDER / f"process_{number}.json"
        progress.replace(path, dataclasses.asdict(told))
        os.utime(path, (time.time() - age,) * 2)

    for number in (1, 2, 3):
        write(number)
    yield write
    mine.close()


def test_nobody_is_behind_where_all_are_as_far(run):
    assert suspects.behind() == "" == suspects.lost(patience=0)


def test_a_process_that_writes_no_more_hangs(run):
    run(2, age=30, section="save", step=12)
    assert suspects.behind() == (
        "process 2 (pid 1002 on node7) has shown no sign of life for 30 s; it last showed section "
        "save, step 12"
    )


def test_a_process_that_hangs_since_before_the_clock_was_set_back(run):
    """Its file is newer than those of the processes that live."""
    run(2, age=-3600)
    run(1, age=0.5)
    assert suspects.behind().startswith("process 2 (pid 1002 on node7) has shown no sign of life")
    assert "process 1" not in suspects.behind() and "process 3" not in suspects.behind()


def test_a_process_that_cannot_write_accuses_no_other(run, tmp_path, monkeypatch):
    """Its own file is the oldest then."""
    own = tmp_path / progress.FOLDER / "process_0.json"
    progress.current.close()
    os.utime(own, (time.time() - 60,) * 2)
    progress.current._folder = tmp_path / progress.FOLDER
    monkeypatch.setattr(progress, "replace", lambda *_: os.open("/", os.O_WRONLY))  # fails
    assert suspects.behind() == ""


def test_a_process_that_lives_and_is_behind(run):
    run(3, step=11)
    run(1, section="evaluation")
    assert suspects.behind().startswith(
        "process 3 (pid 1003 on node7) lives and is behind, in section step, step 11, for"
    )
    assert suspects.lost(patience=0) == ""


@pytest.mark.parametrize(
    "values",
    [{"section": "save"}, {"section": "compile", "step": 0}, {"section": "first_step", "step": 1}],
    ids=str,
)
def test_sections_that_come_before_a_step(run, values):
    run(1, **values)
    assert suspects.behind().startswith("process 1 (pid 1001 on node7) lives and is behind")


def test_a_process_of_this_host_that_is_gone(run):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    run(1, age=3, pid=ended.pid, host=socket.gethostname())
    assert suspects.lost().startswith(f"process 1 (pid {ended.pid} on {socket.gethostname()}) is g")


def test_a_process_that_has_ended_for_a_reason_of_its_own(run):
    run(2, code=1, reason="not enough host memory")
    assert suspects.lost() == (
        "process 2 (pid 1002 on node7) ended, exit code 1: not enough host memory"
    )


def test_a_process_that_waited_for_the_same_one_is_no_cause(run):
    run(1, code=AGAIN, reason="process 1: a step took long. process 2 is gone")
    words = "process 1 ended before this one: a step took long. process 2 is gone"
    assert suspects.behind() == words
    run(2, age=30)
    assert suspects.behind().startswith("process 2 (pid 1002 on node7) has shown no sign of life")


def test_a_process_that_hung_and_goes_on_is_told_that_others_waited_for_it(run):
    own = progress.current.now
    reason = (
        f"process 1: long. process {own.process} (pid {own.pid} on a) has shown no sign of life"
    )
    run(1, code=AGAIN, reason=reason)
    assert suspects.behind().startswith(
        "process 1 waited for this one and ended: long. process 0 ("
    )


def test_processes_of_an_earlier_attempt_do_not_count(run):
    run(1, attempt=2)
    assert suspects.behind() == "process 1 has not shown itself in this attempt"


def test_files_that_cannot_be_read_do_not_stop_it(run, tmp_path):
    for text in ("", "{", "[]", '{"process": 1}'):
        (tmp_path / progress.FOLDER / "process_1.json").write_text(text)
        assert suspects.behind() == "process 1 has not shown itself in this attempt"


def test_many_are_counted(run, tmp_path):
    for number in (1, 2, 3):
        (tmp_path / progress.FOLDER / f"process_{number}.json").unlink()
    suspects_named = suspects.behind()
    assert suspects_named.count("has not shown itself") == 3
    assert suspects._listed(["a"] * 5) == "a; a; a and 2 more"
