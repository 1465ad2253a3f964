"""Ctrl-C, SIGTERM and closed pipes: one line, the documented code, and what can be saved is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

ROOT = Path(__file__).parents[2]
FAST = [sys.executable, "-X", "faulthandler", "-c"]

# A program with the handlers of a command. It says "ready" and goes on as the test wants.
BEGIN = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import importlib.util
file = {str(ROOT)!r} + "/deepseek_jax/runtime/signals.py"
spec = importlib.util.spec_from_file_location("signals", file)
signals = importlib.util.module_from_spec(spec); spec.loader.exec_module(signals)
signals.PATIENCE, signals.LONGEST_CLEANUP = 0.5, 1.0
signals.block()
signals.take_over(75)
def end(error):
    print(signals.told(error.args[0]), file=sys.stderr); sys.exit(signals.code(error.args[0]))
"""
READY = "print('ready', flush=True)\n"

CASES = {
    "while it starts": READY + "time.sleep(30)",
    "at work": "signals.working()\ntry:\n    "
    + READY
    + "    time.sleep(30)\nexcept signals.Stopped as error: end(error)",
    "in a finalizer": "signals.working()\nclass A:\n    def __del__(self):\n        "
    + READY
    + "        time.sleep(5)\na = A(); del a; time.sleep(30)",
    "in C code": "import ctypes, threading\nsignals.working()\n"
    + "threading.Timer(0.5, print, ['ready'], {'flush': True}).start()\n"
    + "lock = ctypes.CDLL(None).pthread_mutex_lock\nmutex = ctypes.create_string_buffer(64)\n"
    + "lock(mutex)\nlock(mutex)",  # the second waits for ever
    "in a cleanup without end": "signals.working()\ntry:\n    "
    + READY
    + "    time.sleep(30)\nfinally:\n    time.sleep(30)",
}


def started(text):
    process = subprocess.Popen(
        [*FAST, BEGIN + text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    "name, code, said",
    [("SIGINT", 130, "Ctrl-C"), ("SIGTERM", 75, "SIGTERM"), ("SIGHUP", 129, "SIGHUP")],
)
@pytest.mark.parametrize("where", CASES)
def test_a_signal_ends_a_command_with_one_line(where, name, code, said):
    process = started(CASES[where])
    process.send_signal(signal.Signals[name])
    _, err = process.communicate(timeout=25)
    assert (process.returncode, err) == (code, f"stopped by {said}\n")


STEPS = """
signals.working()
signals.stepping()
step = 0
print("ready", flush=True)
while signals.heard() is None:
    time.sleep(0.05); step += 1
time.sleep({save})
signals.steps_are_over({stopped})
print("saved", flush=True)
sys.exit(signals.code())
"""


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 75), ("SIGHUP", 129)])
def test_steps_end_before_the_command_does(name, code):
    process = started(STEPS.format(save=1.2, stopped=True))
    process.send_signal(signal.Signals[name])
    time.sleep(0.05)
    process.send_signal(signal.Signals[name])  # as `timeout` and launchers send it
    out, err = process.communicate(timeout=25)
    assert (process.returncode, out, err) == (code, "saved\n", "")


def test_a_second_ctrl_c_ends_at_once():
    process = started(STEPS.format(save=30, stopped=True))
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "stopped by Ctrl-C\n")


def test_a_signal_in_the_last_step_ends_the_command_after_it():
    text = STEPS.format(save=0, stopped=False).replace("signals.steps_are_over(False)", "")
    text = text.replace("sys.exit", "try: signals.steps_are_over(False)\n"
                        "except signals.Stopped as error: end(error)\nsys.exit")  # fmt: skip
    process = started(text)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "saved\n", "stopped by Ctrl-C\n")


def test_an_ended_command_frees_nothing_and_loses_no_output():
    text = """
import atexit
class Freed:
    def __del__(self):
        print("freed", flush=True)
held = Freed()
atexit.register(print, "at exit", flush=False)
print("said", flush=False)
"""
    for end, code, said in [
        ("signals.ended(7); sys.exit(7)", 7, "said\nat exit\n"),
        ("signals.ended(0)", 0, "said\nat exit\n"),
        ("", 0, "said\nat exit\nfreed\n"),  # a session of Python, which is no command's end
    ]:
        done = subprocess.run([*FAST, BEGIN + text + end], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (code, said, "")


def test_signals_that_wait_over_an_exec_are_heard():
    text = "import os\nif len(sys.argv) == 1: pass\n"
    first = f"{BEGIN.split('signals.take_over')[0]}{text}"
    first += "print('ready', flush=True); time.sleep(1)\n"
    first += f"os.execv(sys.executable, [sys.executable, '-c', {BEGIN + 'time.sleep(20)'!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", first], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=25)
    assert (process.returncode, err) == (75, "stopped by SIGTERM\n")


def test_a_closed_pipe_ends_a_command_quietly():
    plan = [sys.executable, "-m", "deepseek_jax.plan", "--config=configs/v3_tiny.py", "--json"]
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        plan, stdout=theirs, stderr=subprocess.PIPE, cwd=ROOT, text=True, timeout=200
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")


def test_output_that_cannot_be_flushed_is_in_the_exit_code():
    text = """
from deepseek_jax.runtime import signals
signals.take_over(143)
from deepseek_jax import endings
import sys
sys.stdout = open(1, "w", buffering=4096, closefd=False)  # whatever PYTHONUNBUFFERED says
print("still in the buffer")
endings.leave(0)
"""
    ours, closed = os.pipe()
    os.close(ours)
    full = os.open("/dev/full", os.O_WRONLY)
    for output, code, said in [(closed, 141, ""), (full, 1, "standard output cannot be written")]:
        done = subprocess.run(
            [*FAST, text], stdout=output, stderr=subprocess.PIPE, cwd=ROOT, text=True
        )
        os.close(output)
        assert done.returncode == code and said in done.stderr and done.stderr.count("\n") < 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, code, line",
    [("SIGINT", 130, "stopped by Ctrl-C\n"), ("SIGTERM", 75, "stopped by SIGTERM\n")],
)
def test_a_run_at_twenty_moments(name, code, line, tmp_path):
    """A signal from the first import to the last picture; what follows resumes."""
    text = runs.documents(tmp_path / "text")
    flags = runs.arguments(runs.tiny(text, mesh={"gpu": 1}), tmp_path / "run")
    begin = time.monotonic()
    assert runs.start_main(flags).wait(timeout=300) == 0
    whole = time.monotonic() - begin
    for moment in range(20):
        workdir = tmp_path / str(moment)
        process = runs.start_main([*flags, f"--workdir={workdir}", "--stop_code=75"])
        time.sleep(0.2 + whole * moment / 20)  # before that Python does not run this package yet
        process.send_signal(signal.Signals[name])
        _, err = process.communicate(timeout=100)
        saved = workdir / "checkpoints"
        assert process.returncode in (code, 0), (moment, err)
        assert err in ("", line), moment
        if err == "":  # in the steps, or after the end
            assert runs.checkpoints(workdir) and saved.exists()
