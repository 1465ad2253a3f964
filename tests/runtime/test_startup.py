"""First steps of a command: which process is one, its sys.path, and its exit code of SIGTERM."""

import subprocess
import sys

import pytest

from deepseek_jax.runtime import startup

ARGUMENTS = ["--workdir=x", "--seed=1"]


@pytest.mark.parametrize(
    "arguments, whole, module",
    [
        (
            ["-m", *ARGUMENTS],
            ["python", "-m", "deepseek_jax.main", *ARGUMENTS],
            "deepseek_jax.main",
        ),
        (["-m"], ["python", "-u", "-m", "deepseek_jax.plan"], "deepseek_jax.plan"),
        (["-m"], ["python", "-mdeepseek_jax.plan"], "deepseek_jax.plan"),
        (["-m"], ["python", "-m", "pytest"], "pytest"),
        (["/a/script.py", "-m"], ["python", "/a/script.py", "-m"], ""),
        (["-c"], ["python", "-c", "from multiprocessing.spawn import spawn_main"], ""),
    ],
)
def test_the_module_that_python_runs(arguments, whole, module):
    assert startup._module(arguments, whole) == module


@pytest.mark.parametrize(
    "module, arguments, code",
    [
        ("main", [], 0),
        ("main", ["--stop_code=75"], 75),
        ("main", ["--stop_code", "75"], 75),
        ("main", ["--stop_code=75", "-stop_code=3"], 3),
        ("main", ["--stop_code=much"], 0),
        ("convert", [], 143),
    ],
)
def test_the_exit_code_after_sigterm(module, arguments, code):
    assert startup._code_of_sigterm(f"deepseek_jax.{module}", arguments) == code


def test_the_working_directory_is_forgotten(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/lib"])
    startup._forget_working_directory()
    assert sys.path == ["/lib"]
    home = startup.__file__.rsplit("/", 3)[0]  # the package comes from there
    monkeypatch.setattr(sys, "path", [home, "/lib"])
    startup._forget_working_directory()
    assert sys.path == ["/lib", home]


def test_importing_the_package_changes_no_handler():
    script = (
        "import signal, sys; path = list(sys.path); import deepseek_jax; "
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler; "
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL; "
        "assert sys.path == path and sys.excepthook is sys.__excepthook__"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=200).returncode == 0
