"""Seconds and memory that the commands of the plan take, each in a process of its own.

PYTHONPATH=tests:. .venv/bin/python tests/plan_costs.py            prints a table; three minutes
PYTHONPATH=tests:. .venv/bin/python tests/plan_costs.py NAME...    the same for some commands

`plan` of every config on H800s, `--compare` of V3, and `--search` of V3 and of V3 with sequences of
128K tokens, of which no layout fits. Exit code 1 where one takes longer than its bound.
"""

import json
import os
import subprocess
import sys
import time

from all_configs import FOLDER, NAMES

from deepseek_jax.table import text

GB = 1.5  # bound of the memory of each command
SEARCH = ("--search", "--devices=2048", "--hardware=h800")
COMMANDS = {
    **{name: (name, ("--hardware=h800",), 30) for name in NAMES},
    "--compare": ("v3_671b", ("--compare", "--picture=ideas.png"), 60),
    "--search": ("v3_671b", SEARCH, 120),
    "--search, asynchronous": ("v3_671b", (*SEARCH, "--execution=asynchronous"), 120),
    "--search, nothing fits": ("v3_671b_128k", SEARCH, 120),
}


def run(name, arguments, folder):
    """(seconds, CPU seconds, GB, exit code) of a command of the plan."""
    command = [sys.executable, "-m", "deepseek_jax.plan", f"--config={FOLDER / name}.py"]
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - start
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6, process.returncode


def main(folder, labels):
    rows, late = [], 0
    for label in labels:
        name, arguments, bound = COMMANDS[label]
        seconds, cpu, size, code = run(name, arguments, folder)
        row = {"command": label, "s": seconds, "bound_s": bound, "CPU_s": cpu, "GB": size}
        rows.append({**row, "exit": code})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        late += seconds > bound or size > GB
    print(text({"rows": rows}))
    return int(late > 0)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        sys.exit(main(made, sys.argv[1:] or COMMANDS))
