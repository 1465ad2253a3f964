"""`.ci/run` on a checkout whose tools are stubs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = "<!-- test command -->\n```sh\n.venv/bin/python -m pytest\n```\n"


def stub(path: Path, lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    "readme, python, status, said",
    [
        (README, "exit 0", 0, "of 1200 seconds"),
        (README, 'case "$*" in *pytest*) exit 3;; esac', 3, ""),
        ("no command\n", "exit 0", 1, "no test command"),
    ],
    ids=["passes", "tests fail", "no tests"],
)
def test_what_fails_the_run(tmp_path, readme, python, status, said):
    """In a folder whose name has a space, without Python 3.12."""
    checkout, elsewhere = tmp_path / "a checkout", tmp_path / "bin"
    (checkout / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci" / "run")
    (checkout / "README.md").write_text(readme)
    stub(checkout / ".venv/bin/python", python)
    for tool in ("pip", "ruff", "mypy"):
        stub(checkout / ".venv/bin" / tool, "exit 0")
    stub(elsewhere / "python3.12", "exit 1")
    done = subprocess.run(
        [checkout / ".ci" / "run"],
        env={
            **os.environ,
            "PATH": f"{elsewhere}{os.pathsep}{os.environ['PATH']}",
            "PYENV_ROOT": str(tmp_path),  # where a Python 3.12 is looked for, too
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
