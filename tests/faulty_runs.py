"""Faults of real processes: each signal to each process at each section, and what the others say.

    PYTHONPATH=tests:. .venv/bin/python tests/faulty_runs.py --processes=2,4 --only=save

prints a line per fault and, at the end, how many were survived as promised, and the longest time
from a fault (or from the deadline that finds it) to the end of the last process. Exit code 1 where
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import runs

AGAIN, STOPPED = 76, 75
SECTIONS = ("join", "start", "compile", "first_step", "step", "save", "evaluation", "end")
SAVING = ("first_step", "step", "save")  # SIGTERM in these saves, and stops all processes
SIGNALS = ("SIGKILL", "SIGSTOP", "SIGTERM")
WITHIN = 60.0  # seconds from a fault, or a deadline, to the end of all processes

# Seconds on two cores that other work shares. A stopped process falls silent before them.
DEADLINES = dict(
    join=25, start=60, compile=90, first_step=40, step=20, save=20, evaluation=40, end=15
)
# Quick to compile: one dense layer, without optimisation. What a collective waits for is the same.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
SETTINGS = {
    "model.layers": 1, "model.dense_layers": 1, "model.mtp_depth": 0, "optimizer.ema_decay": 0,
    "layout.unroll": 1, "layout.capacity_factor": 100, "checkpoint.every_steps": 4,
    "schedule.tokens": 3000, "mesh.gpu": -1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fault:
    """A signal to one of the processes at a section.

    Attributes:
      signal: name of the signal; "" for a process that never comes.
    """

    signal: str
    section: str
    process: int
    processes: int

    def __str__(self) -> str:
        what = self.signal or "never joins"
        return f"{what} of process {self.process} of {self.processes} in {self.section}"


def all_faults(processes: int) -> list[Fault]:
    faults = [
        Fault(name, section, process, processes)
        for section, name, process in itertools.product(SECTIONS, SIGNALS, range(processes))
    ]
    return faults + [Fault("", "join", process, processes) for process in range(processes)]


@dataclasses.dataclass
class Outcome:
    """How a run with a fault ended.

    Attributes:
      codes: exit code by process; that of the faulty one may be any.
      texts: standard error by process.
      seconds: from the fault to the end of the last process that could end.
    """

    codes: list[int | None]
    texts: list[str]
    seconds: float
    workdir: Path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def flags(text: Path, workdir: Path, **changed: object) -> list[str]:
    """Flags of a run of `tiny.py`; keys of `changed` have __ for a dot."""
    settings = SETTINGS | {f"deadlines.{name}": value for name, value in DEADLINES.items()}
    settings |= {"data.path": text, "data.cache": text.parent / "cache", "evaluation.tokens": 0}
    settings |= {key.replace("__", "."): value for key, value in changed.items()}
    named = [f"--config.{key}={value}" for key, value in settings.items()]
    common = [f"--config={runs.TINY}", f"--workdir={workdir}", "--emulate_devices=1"]
    return [*common, "--stop_code=75", *named]


def environment(fault: Fault | None, note: Path) -> dict[str, str]:
    path = [
        str(runs.ROOT / "tests" / "survival" / "injected"),
        str(runs.ROOT),
        str(runs.ROOT / "tests"),
    ]
    made = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "XLA_FLAGS": XLA_FLAGS}
    made["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if fault and fault.signal:
        made["FAULT"] = f"{fault.signal}:{fault.section}:{fault.process}:{note}"
    return made


def inject(fault: Fault, text: Path, folder: Path) -> Outcome:
    """Runs all processes, with the fault in one of them, until the others have ended."""
    workdir, note = folder / "run", folder / "note"
    scored = {"evaluation__tokens": 256} if fault.section == "evaluation" else {}
    where = [f"--coordinator=localhost:{free_port()}", f"--processes={fault.processes}"]
    common = [*flags(text, workdir, **scored), *where]
    began, started, files = time.time(), {}, {}
    for number in range(fault.processes):
        if not fault.signal and number == fault.process:
            continue
        files[number] = (folder / f"{number}.err").open("w+")
        command = [sys.executable, "-m", "deepseek_jax.main", *common, f"--process={number}"]
        started[number] = subprocess.Popen(
            command, env=environment(fault, note), stdout=subprocess.DEVNULL,
            stderr=files[number], cwd=runs.ROOT,
        )  # fmt: skip
    try:
        others = [p for number, p in started.items() if number != fault.process]
        until = time.monotonic() + 400
        while any(p.poll() is None for p in others) and time.monotonic() < until:
            time.sleep(0.1)
        ended = time.time()
        faulty = started.get(fault.process)
        if faulty and fault.signal == "SIGTERM":
            with contextlib.suppress(subprocess.TimeoutExpired):
                faulty.wait(60)
        codes = [started[n].poll() if n in started else None for n in range(fault.processes)]
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    struck = float(note.read_text()) if note.exists() else began
    texts = [""] * fault.processes
    for number, file in files.items():
        file.seek(0)
        texts[number] = file.read()
        file.close()
    return Outcome(codes, texts, ended - struck, workdir)


def complaints(fault: Fault, outcome: Outcome, folder: Path) -> list[str]:
    """Promises that were not kept."""
    broken = []
    if fault.signal and not (folder / "note").exists():
        return ["the fault did not happen"]
    stacks = outcome.workdir / "stacks"
    saves = fault.signal == "SIGTERM" and fault.section in SAVING
    for number, (code, text) in enumerate(zip(outcome.codes, outcome.texts, strict=True)):
        lines = [line for line in text.splitlines() if " waits for " not in line]
        if number == fault.process:
            expected = {"SIGKILL": -signal.SIGKILL, "SIGTERM": STOPPED}.get(fault.signal, code)
        else:
            expected = STOPPED if saves else AGAIN
        if code != expected:
            broken.append(f"process {number} ended with {code} instead of {expected}")
        if len(lines) > 1:
            broken.append(f"process {number} said {len(lines)} lines")
        if number != fault.process and not saves:
            named = lines and re.search(rf"process {fault.process}\b", lines[-1].split(": ", 1)[-1])
            if not named or not lines[-1].startswith("error: "):
                broken.append(f"process {number} did not name process {fault.process}")
            if "(deadlines." in text and not list(stacks.glob(f"process_{number}_*")):
                broken.append(f"process {number} wrote no stacks")
    if outcome.seconds > allowed(fault):
        broken.append(f"it took {outcome.seconds:.0f} s, and {allowed(fault):.0f} are promised")
    if saves and not runs.checkpoints(outcome.workdir):
        broken.append("nothing was saved")
    return broken


def allowed(fault: Fault) -> float:
    """Seconds in which the last process has to end."""
    waits = fault.signal in ("SIGSTOP", "") or fault.section == "join"
    return WITHIN + (DEADLINES[fault.section] if waits else 0)


def try_out(fault: Fault, text: Path, folder: Path) -> tuple[list[str], Outcome]:
    folder.mkdir()
    outcome = inject(fault, text, folder)
    return complaints(fault, outcome, folder), outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", default="2,4")
    parser.add_argument("--only", default="", help="regular expression over a fault's line")
    parser.add_argument("--verbose", action="store_true")
    chosen = parser.parse_args()
    faults = [f for n in chosen.processes.split(",") for f in all_faults(int(n))]
    faults = [f for f in faults if re.search(chosen.only, str(f))]
    kept, longest = 0, ("", 0.0)
    with tempfile.TemporaryDirectory() as root:
        text = runs.documents(Path(root) / "text")
        for number, fault in enumerate(faults):
            broken, outcome = try_out(fault, text, Path(root) / str(number))
            late = outcome.seconds - (allowed(fault) - WITHIN)
            longest = max(longest, (str(fault), late), key=lambda pair: pair[1])
            kept += not broken
            print(f"{'; '.join(broken) or 'kept'}: {fault}, {outcome.seconds:.1f} s", flush=True)
            if chosen.verbose or broken:
                for who, said in enumerate(outcome.texts):
                    print(json.dumps({"process": who, "code": outcome.codes[who],
                                      "said": said[-1500:]}), flush=True)  # fmt: skip
    print(
        f"{len(faults)} faults, {kept} survived as promised; longest time to the end of all "
        f"processes after the fault or its deadline: {longest[1]:.1f} s ({longest[0]})"
    )
    return kept != len(faults)


if __name__ == "__main__":
    sys.exit(main())
