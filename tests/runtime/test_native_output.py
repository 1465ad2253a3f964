"""The log of C++ libraries, which the end of a process reads even where its folder is gone."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

WRITES = """
import os, pathlib, shutil, sys
from deepseek_jax.runtime import native_output
native_output.divert()
os.write(2, b"before, ")
workdir = pathlib.Path(sys.argv[1])
(workdir / "logs").mkdir(parents=True)
(workdir / "logs" / "process_3.log").write_text("of an earlier attempt")
native_output.keep(workdir, 3)
os.write(2, b"after")
assert (workdir / "logs" / "process_3.log").read_text() == "of an earlier attemptbefore, after"
shutil.rmtree(workdir)
os.write(2, b", and at the end")
print(native_output.tail())
"""


def test_the_tail_is_read_where_the_file_was_removed(tmp_path):
    """An abort of XLA has its reason there, and the process would else dump its core."""
    command = [sys.executable, "-c", WRITES, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("before, after, and at the end\n", "")
    assert done.returncode == 0
