"""Faults of real processes: each signal to each process at each section, and what the others say.

    PYTHONPATH=tests:. .venv/bin/python tests/faulty_runs.py --processes=2,4 --folder=matrix

prints a line per fault and, at the end, how many were survived as promised, section by section, and
the longest time from a fault (or from the deadline that finds it) to the end of the last process.
Exit code 1 where a promise was not kept. Each fault adds a line to `matrix/faults.jsonl`, and those
that are there already, of the same commit, are not run again: so the matrix can be run in parts of
`--minutes` each. Compiled programs are kept in the folder, by undisturbed runs that come first;
runs with a fault while they compile read none of them. With `--fork` processes are forked after the
imports, which take half of the time that a run of eight steps takes.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked_main
import runs

INJECTED = Path(__file__).parent / "survival" / "injected"
AGAIN, STOPPED = 76, 75
SECTIONS = ("join", "start", "compile", "first_step", "step", "save", "evaluation", "end")
SAVING = ("first_step", "step", "save")  # SIGTERM in these saves, and stops all processes
SIGNALS = ("SIGKILL", "SIGSTOP", "SIGTERM")
DID_NOT_HAPPEN = "the fault did not happen"  # as where a machine is too busy for the deadlines
WITHIN = 60.0  # seconds from a fault, or a deadline, to the end of all processes

# Seconds on two cores that other work shares. A stopped process falls silent before them.
DEADLINES = dict(
    join=25, start=45, compile=75, first_step=25, step=15, save=15, evaluation=30, end=12
)
# Quick to compile: one dense layer, without optimisation. What a collective waits for is the same.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
SETTINGS = {
    "model.layers": 1, "model.dense_layers": 1, "model.mtp_depth": 0, "optimizer.ema_decay": 0,
    "layout.unroll": 1, "layout.capacity_factor": 100, "checkpoint.every_steps": 4,
    "schedule.tokens": 3000, "mesh.gpu": -1,
}  # fmt: skip
SCORED = {"evaluation__tokens": 256}
# Steps for more than the second that processes take to agree on the step at which they stop.
LONG = {"schedule__tokens": 16000}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A signal to one of the processes at a section.

    Attributes:
      signal: name of the signal; "" for a process that never comes.
      step: the first step at which a fault in `step` happens.
    """

    signal: str
    section: str
    process: int
    processes: int
    step: int = 4

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
    """A port below those that the system gives out, so that nobody else is given it."""
    while True:
        port = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("localhost", port))
            return port


def flags(text: Path, workdir: Path, **changed: object) -> list[str]:
    """Flags of a run of `tiny.py`; keys of `changed` have __ for a dot."""
    settings = SETTINGS | {f"deadlines.{name}": value for name, value in DEADLINES.items()}
    settings |= {"data.path": text, "data.cache": text.parent / "cache", "evaluation.tokens": 0}
    settings |= {key.replace("__", "."): value for key, value in changed.items()}
    named = [f"--config.{key}={value}" for key, value in settings.items()]
    common = [f"--config={runs.TINY}", f"--workdir={workdir}", "--emulate_devices=1"]
    return [*common, "--stop_code=75", *named]


def environment(
    fault: Fault | None, note: Path, programs: Path | None = None, *, keep: bool = False
) -> dict[str, str]:
    """Variables of a process.

    Args:
      note: file for the time of the fault.
      programs: folder of compiled programs; None for JAX's own settings.
      keep: whether the process writes there; else it reads alone.
    """
    tests = runs.ROOT / "tests"
    path = [str(folder) for folder in (INJECTED, runs.ROOT, tests)]
    made = {"XLA_FLAGS": XLA_FLAGS, **os.environ, "PYTHONPATH": os.pathsep.join(path)}
    made["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if fault and fault.signal:
        place = f"{fault.section}:{fault.process}:{fault.step}"
        made["FAULT"] = f"{fault.signal}:{place}:{note}"
    if programs:
        made["JAX_COMPILATION_CACHE_DIR"] = str(programs)
        made["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0" if keep else "1000000"
    if keep:
        made["KEEP_PROGRAMS"] = "1"
    if fault and fault.section == "compile":
        made["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    return made


class Forked:
    """A process of a run, forked from a server that has imported what the command imports."""

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["forked_main"])

    def __init__(self, arguments: list[str], environment: dict[str, str], told: Path):
        self._process = self.server.Process(
            target=forked_main.run, args=(arguments, environment, str(told))
        )
        self._process.start()
        self.kill = self._process.kill
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode


def begin(arguments: list[str], environment: dict[str, str], told: Path, *, fork: bool) -> Any:
    """Starts the command; its standard error goes to the file `told`."""
    if fork:
        return Forked(arguments, environment, told)
    with told.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "deepseek_jax.main", *arguments],
            env=environment, stdout=subprocess.DEVNULL, stderr=file, cwd=runs.ROOT,
        )  # fmt: skip


@contextlib.contextmanager
def started(
    flags: list[str],
    environment: dict[str, str],
    folder: Path,
    numbers: list[int],
    processes: int,
    *,
    fork: bool = False,
) -> Iterator[dict[int, Any]]:
    """Processes of these numbers, whose standard errors go to `folder/N.err`."""
    common = [*flags, f"--coordinator=localhost:{free_port()}", f"--processes={processes}"]
    made = {}
    try:
        for number in numbers:
            told = folder / f"{number}.err"
            made[number] = begin([*common, f"--process={number}"], environment, told, fork=fork)
        yield made
    finally:
        for process in made.values():
            process.kill()
            process.wait()


def inject(
    fault: Fault, text: Path, folder: Path, programs: Path | None = None, *, fork: bool = False
) -> Outcome:
    """Runs all processes, with the fault in one of them, until the others have ended."""
    workdir, note, began = folder / "run", folder / "note", time.time()
    changed = SCORED if fault.section == "evaluation" else LONG if saves(fault) else {}
    numbers = [n for n in range(fault.processes) if fault.signal or n != fault.process]
    variables = environment(fault, note, programs)
    made = flags(text, workdir, **changed)
    with started(made, variables, folder, numbers, fault.processes, fork=fork) as processes:
        others = [process for number, process in processes.items() if number != fault.process]
        until = time.monotonic() + 400
        while any(p.poll() is None for p in others) and time.monotonic() < until:
            time.sleep(0.1)
        ended = time.time()
        faulty = processes.get(fault.process)
        if faulty and fault.signal == "SIGTERM":
            with contextlib.suppress(subprocess.TimeoutExpired):
                faulty.wait(60)
        codes = [processes[n].poll() if n in processes else None for n in range(fault.processes)]
    struck = float(note.read_text()) if note.exists() else began
    told = [folder / f"{number}.err" for number in range(fault.processes)]
    texts = [file.read_text() if file.exists() else "" for file in told]
    return Outcome(codes, texts, ended - struck, workdir)


def complaints(fault: Fault, outcome: Outcome, folder: Path) -> list[str]:
    """Promises that were not kept."""
    broken = []
    if fault.signal and not (folder / "note").exists():
        return [DID_NOT_HAPPEN]
    stacks = outcome.workdir / "stacks"
    for number, (code, text) in enumerate(zip(outcome.codes, outcome.texts, strict=True)):
        lines = [line for line in text.splitlines() if " waits for " not in line]
        if number == fault.process:
            expected = {"SIGKILL": -signal.SIGKILL, "SIGTERM": STOPPED}.get(fault.signal, code)
        else:
            expected = STOPPED if saves(fault) else AGAIN
        if code != expected:
            broken.append(f"process {number} ended with {code} instead of {expected}")
        if len(lines) > 1:
            broken.append(f"process {number} said {len(lines)} lines")
        if number != fault.process and not saves(fault):
            named = lines and re.search(rf"process {fault.process}\b", lines[-1].split(": ", 1)[-1])
            if not named or not lines[-1].startswith("error: "):
                broken.append(f"process {number} did not name process {fault.process}")
            if "(deadlines." in text and not list(stacks.glob(f"process_{number}_*")):
                broken.append(f"process {number} wrote no stacks")
    if outcome.seconds > allowed(fault):
        broken.append(f"it took {outcome.seconds:.0f} s, and {allowed(fault):.0f} are promised")
    if saves(fault) and not runs.checkpoints(outcome.workdir):
        broken.append("nothing was saved")
    return broken


def saves(fault: Fault) -> bool:
    """Whether all processes have to save and stop after the same step."""
    return fault.signal == "SIGTERM" and fault.section in SAVING


def allowed(fault: Fault) -> float:
    """Seconds in which the last process has to end."""
    waits = fault.signal in ("SIGSTOP", "") or fault.section == "join"
    return WITHIN + (DEADLINES[fault.section] if waits else 0)


def try_out(
    fault: Fault, text: Path, folder: Path, programs: Path | None = None, *, fork: bool = False
) -> tuple[list[str], Outcome]:
    folder.mkdir()
    outcome = inject(fault, text, folder, programs, fork=fork)
    return complaints(fault, outcome, folder), outcome


class Matrix:
    """Faults that were tried, of one commit, in a folder that keeps them."""

    def __init__(self, folder: Path, *, fork: bool):
        folder.mkdir(exist_ok=True)
        self._fork = fork
        self._folder, self._file = folder, folder / "faults.jsonl"
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        said = subprocess.run(command, capture_output=True, text=True, cwd=runs.ROOT)
        self._commit = said.stdout.strip()
        self._text, self._programs = folder / "text", folder / "programs"
        if not self._text.exists():
            runs.documents(self._text)

    def rows(self) -> list[dict]:
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        return [row for row in map(json.loads, lines) if row["commit"] == self._commit]

    def prepare(self, processes: int) -> None:
        """Keeps the programs of a run that nothing disturbs."""
        folder, programs = self._folder / f"prepared_{processes}", self._programs
        if folder.exists():
            return
        with tempfile.TemporaryDirectory() as place:
            variables = environment(None, Path(), programs, keep=True)
            made = flags(self._text, Path(place) / "run", **SCORED)
            numbers = list(range(processes))
            with started(made, variables, Path(place), numbers, processes) as made_now:
                codes = [process.wait(400) for process in made_now.values()]
            assert codes == [0] * processes, (Path(place) / "0.err").read_text()
        folder.mkdir()

    def run(self, fault: Fault) -> None:
        """Tries a fault, and adds a row for it."""
        place = Path(tempfile.mkdtemp(prefix="fault_", dir=self._folder))
        broken, outcome = try_out(fault, self._text, place / "it", self._programs, fork=self._fork)
        late = outcome.seconds - (allowed(fault) - WITHIN)
        row = {
            "commit": self._commit, "forked": self._fork, "fault": dataclasses.asdict(fault),
            "broken": broken,
            "seconds": round(outcome.seconds, 1), "late": round(late, 1), "codes": outcome.codes,
            "said": [text[-1500:] for text in outcome.texts],
        }  # fmt: skip
        if broken != [DID_NOT_HAPPEN]:
            with self._file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        print(f"{'; '.join(broken) or 'kept'}: {fault}, {outcome.seconds:.1f} s", flush=True)
        for number, said in enumerate(row["said"] if broken else []):
            told = {"process": number, "code": outcome.codes[number], "said": said}
            print(json.dumps(told), flush=True)
        if not broken:
            shutil.rmtree(place)


def table(rows: list[dict]) -> str:
    """Faults by section and signal: survived as promised, of all; and the longest time."""
    lines = [f"{'section':<12}{'SIGKILL':>10}{'SIGSTOP':>10}{'SIGTERM':>10}{'absent':>10}  longest"]
    for section in SECTIONS:
        here = [row for row in rows if row["fault"]["section"] == section]
        cells = ""
        for name in (*SIGNALS, ""):
            of_it = [row for row in here if row["fault"]["signal"] == name]
            kept = sum(not row["broken"] for row in of_it)
            cells += f"{f'{kept} of {len(of_it)}' if of_it else '':>10}"
        longest = max((row["late"] for row in here), default=0.0)
        lines.append(f"{section:<12}{cells}  {longest:.1f} s")
    kept = sum(not row["broken"] for row in rows)
    last = max(rows, key=lambda row: row["late"])
    lines.append(
        f"{len(rows)} faults, {kept} survived as promised; longest time to the end of all "
        f"processes after the fault or its deadline: {last['late']:.1f} s "
        f"({Fault(**last['fault'])})"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", default="2,4")
    parser.add_argument("--only", default="", help="regular expression over a fault's line")
    parser.add_argument("--folder", type=Path, help="folder that keeps results; else a new one")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no fault after this time")
    parser.add_argument("--together", type=int, default=1, help="faults at one time")
    parser.add_argument("--fork", action="store_true", help="fork processes after the imports")
    chosen = parser.parse_args()
    until = time.monotonic() + 60 * chosen.minutes
    counts = [int(count) for count in chosen.processes.split(",")]
    faults = [fault for count in counts for fault in all_faults(count)]
    faults = [fault for fault in faults if re.search(chosen.only, str(fault))]
    random.Random(0).shuffle(faults)  # those that compute beside those that wait
    matrix = Matrix(chosen.folder or Path(tempfile.mkdtemp(prefix="faults_")), fork=chosen.fork)
    for count in counts:
        matrix.prepare(count)

    def run(fault: Fault) -> None:
        if time.monotonic() < until:
            matrix.run(fault)

    def asked() -> list[dict]:
        return [row for row in matrix.rows() if Fault(**row["fault"]) in faults]

    done = [Fault(**row["fault"]) for row in asked()]
    with concurrent.futures.ThreadPoolExecutor(chosen.together) as pool:
        list(pool.map(run, [fault for fault in faults if fault not in done]))
    rows = asked()
    print(table(rows))
    if len(rows) < len(faults):
        print(f"{len(faults) - len(rows)} faults are left; the same command goes on")
    return sum(not row["broken"] for row in rows) != len(faults)


if __name__ == "__main__":
    sys.exit(main())
