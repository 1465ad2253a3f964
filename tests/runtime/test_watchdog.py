"""The watchdog: its deadlines, and processes that it ends while their main thread hangs."""

import dataclasses
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_jax.config import DeadlineConfig
from deepseek_jax.errors import AGAIN
from deepseek_jax.runtime import progress, watchdog

ROOT = Path(__file__).parents[2]
DEADLINES = DeadlineConfig(
    join=1, start=2, compile=3, first_step=4, step=0, save=6, evaluation=7, end=8
)


@pytest.mark.parametrize(
    "section, seconds",
    [("start", 2), ("compile", 3), ("first_step", 4), ("save", 6), ("evaluation", 7), ("end", 8)],
)
def test_every_section_has_its_deadline(section, seconds):
    now = dataclasses.replace(progress.Publisher().now, section=section)
    assert watchdog.limit(DEADLINES, now) == seconds


@pytest.mark.parametrize(
    "set_to, median, seconds", [(0, None, 4), (0, 0.1, 180), (0, 30.0, 300), (50, 30.0, 50)]
)
def test_the_deadline_of_a_step_is_learnt_unless_it_is_set(set_to, median, seconds):
    now = progress.Publisher().now
    now = dataclasses.replace(now, section="step", median_step_seconds=median)
    assert watchdog.limit(dataclasses.replace(DEADLINES, step=set_to), now) == seconds


HANGS = """
import ctypes, pathlib, sys, time
from deepseek_jax.config import DeadlineConfig
from deepseek_jax.runtime import progress, signals, watchdog
signals.take_over(143)
watchdog._SLACK_SECONDS = 1.0
limits = DeadlineConfig(
    join=1, start={deadline}, compile=9, first_step=9, step=9, save=9, evaluation=9, end=9
)
mine = progress.begin(0, {processes})
mine.enter("start")
mine.attach(pathlib.Path(sys.argv[1]), 0)
def hang_here():
    ctypes.{library}("libc.so.6").sleep({locked})
with watchdog.watching(limits, pathlib.Path(sys.argv[1])):
    time.sleep({first})
    {act}
"""


def script(**how: object) -> str:
    usual = {"processes": 1, "library": "CDLL", "first": 0, "deadline": 1, "act": "hang_here()"}
    usual["locked"] = 60
    return HANGS.format(**usual | how)


def hang(folder: Path, **how: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script(**how), str(folder)],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=ROOT,
    )


def test_a_call_that_hangs_without_the_lock_is_ended_and_its_stacks_are_kept(tmp_path):
    done = hang(tmp_path)
    assert done.returncode == AGAIN
    [line] = done.stderr.splitlines()
    said = r"error: process 0: section start, step 0, took more than 1 s \(deadlines\.start\)\. "
    found = re.fullmatch(said + r"Stacks: (\S+)", line)
    assert found and "in hang_here" in Path(found[1]).read_text()
    assert Path(found[1]).parent == tmp_path / "stacks"


def test_the_process_that_is_missing_is_named(tmp_path):
    done = hang(tmp_path, processes=2)
    assert done.returncode == AGAIN
    assert "process 1 has not shown itself in this attempt. Stacks: " in done.stderr


def test_a_call_that_keeps_the_lock_is_ended_with_its_stack(tmp_path):
    """No thread of Python runs while it hangs; PyDLL keeps Python's lock."""
    done = hang(tmp_path, library="PyDLL", first=0.8, processes=2)
    assert done.returncode == -signal.SIGALRM
    assert "in hang_here" in done.stderr


def test_a_lone_process_that_is_locked_tells_its_stack_and_goes_on(tmp_path):
    """It cannot be told from one that was stopped by hand."""
    done = hang(tmp_path, library="PyDLL", first=0.8, locked=5)
    assert (done.returncode, done.stderr.count("in hang_here")) == (0, 1)
    assert not (tmp_path / "stacks").exists()


def test_time_in_which_a_lone_process_is_stopped_does_not_count(tmp_path):
    """As after Ctrl-Z and `fg`, past the deadline and the time in which C code may keep a lock."""
    act = "print('here', flush=True); sys.stdin.read(1); time.sleep(1.5)"
    run = subprocess.Popen(
        [sys.executable, "-c", script(deadline=3, act=act), str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert run.stdout.readline() == "here\n"
        run.send_signal(signal.SIGSTOP)
        time.sleep(5)
        run.send_signal(signal.SIGCONT)
        _, err = run.communicate("x", timeout=20)
    finally:
        run.kill()
    assert (run.returncode, "error: " in err) == (0, False)  # perhaps stacks: see above
    assert not (tmp_path / "stacks").exists()
