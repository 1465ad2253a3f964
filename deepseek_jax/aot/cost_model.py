"""What a compiled program would cost at assumed rates: for the scheduler to believe, and to replay.

No time here is measured: a GEMM takes its FLOPs at a sustained rate, a collective its bytes over
the link of its hop, anything else its memory traffic. XLA's scheduler is told so in its own profile
format and then starts collectives early enough; its own estimate makes the windows too short. Where
there is a GPU, hand it a measured profile instead. On an H100 `bench layer` measured 0.93 of the
time that this file gives attention at V3's sizes, and 0.96 of that of a whole layer.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from deepseek_jax.aot import cluster, compiled, hlo
from deepseek_jax.aot.compiled import Collective, Gemm, Kernels, Program
from deepseek_jax.aot.hlo import Computation, Instruction, Module
from deepseek_jax.hardware import network

_LINKS = network.H800


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one device is assumed to sustain, in 1/s: an H800.

    Of its peaks of 989 TFLOP/s (FP8: twice that) and 3.35 TB/s about 60 and 75 %; links as the
    report counts them (section 3.2.2).
    """

    flops: float = 600e12
    flops_fp8: float = 1200e12
    memory_bytes: float = 2.5e12
    slow_bytes: float = _LINKS.infiniband_bytes_per_s
    fast_bytes: float = _LINKS.nvlink_effective_bytes_per_s or _LINKS.nvlink_bytes_per_s


@dataclasses.dataclass(frozen=True)
class Wait:
    """One collective in the replay, all its runs together.

    Attributes:
      seconds: it travels.
      exposed: of these, the device has nothing to do but wait for it.
    """

    collective: Collective
    seconds: float
    exposed: float

    @property
    def hidden(self) -> float:
        return self.seconds - self.exposed


@dataclasses.dataclass(frozen=True)
class ReplayedTimeline:
    """A replayed program: `total` seconds, `compute` of them at work and the rest waiting."""

    total: float
    compute: float
    waits: tuple[Wait, ...]

    @property
    def exposed(self) -> float:
        return sum(wait.exposed for wait in self.waits)

    @property
    def hidden_share(self) -> float:
        """How much of the time that collectives travel is hidden behind compute, 0 to 1."""
        seconds = sum(wait.seconds for wait in self.waits)
        return 1 - self.exposed / seconds if seconds else 1.0


def compile_profiled(
    lowered: jax.stages.Lowered,
    mesh: Mesh,
    rates: Rates | None = None,
    kernels: Kernels | None = None,
    options: Mapping[str, Any] | None = None,
) -> jax.stages.Compiled:
    """Compiles, counts what each instruction costs, and compiles again with these costs.

    Args:
      lowered, options: as in `cluster.compile_for`.
      mesh, kernels: as in `compiled.read`.
    """
    first = compiled.read(cluster.compile_for(lowered, options), mesh, kernels)
    return cluster.compile_for(lowered, options, text(costs(first, rates or Rates())))


def costs(program: Program, rates: Rates, unknown_trips: int = 1) -> dict[str, float]:
    """Seconds of one run of each instruction, by the scheduler's name; what takes none is left out.

    A loop counts its body's replay times its trips; a conditional the longest of its branches.

    Args:
      unknown_trips: of a loop whose length the compiler does not know.
    """
    module = program.module
    found = {c.name: _collective_seconds(c, rates) for c in program.collectives}
    steps = [
        (computation, line)
        for computation in compiled.scheduled(module)
        for line in module.computations[computation].values()
        if not compiled.kind_of(module, computation, line)
    ]
    for computation, line in steps:
        if not _steps_into(line):
            found[line.scheduling_name] = _seconds(program, computation, line, rates)
    for _, line in steps:
        if _steps_into(line):
            found[line.scheduling_name] = _Replay(program, found, unknown_trips).into(line, 0.0, 1)
    return {name: seconds for name, seconds in found.items() if seconds}


def text(seconds: Mapping[str, float]) -> str:
    """In the form that `cluster.compile_for` hands to XLA."""
    return "".join(f'costs {{ name: "{n}" cost_us: {s * 1e6!r} }}\n' for n, s in seconds.items())


def parse(profile: str) -> dict[str, float]:
    """The seconds that `text` wrote."""
    found = re.findall(r'costs \{ name: "([^"]*)" cost_us: (\S+) \}', profile)
    return {name: float(cost_us) / 1e6 for name, cost_us in found}


def replay(
    program: Program, seconds: Mapping[str, float], computation: str = "", unknown_trips: int = 1
) -> ReplayedTimeline:
    """Runs the schedule on paper: compute in order, and one collective at a time beside it.

    Not modelled: the SMs that a collective takes from a GEMM, launches, and NCCL's start-up.

    Args:
      seconds: of one run of each instruction, as `costs` gives them, or measured.
      computation: one run of this one, such as a loop's body, instead of the whole program.
      unknown_trips: as in `costs`.
    """
    run = _Replay(program, seconds, unknown_trips)
    total = run.through(computation or program.module.entry, 0.0, 1)
    waits = tuple(Wait(c, *run.waits[c.name]) for c in program.collectives if c.name in run.waits)
    return ReplayedTimeline(total, run.compute, waits)


class _Replay:
    """Walks through computations and adds up, each `times` its single run."""

    def __init__(self, program: Program, seconds: Mapping[str, float], unknown_trips: int) -> None:
        self.module, self.seconds, self.compute = program.module, seconds, 0.0
        self.unknown_trips = unknown_trips
        self.waits: dict[str, tuple[float, float]] = {}  # travelling, exposed
        self.starts = {(c.computation, c.start): c for c in program.collectives}
        self.dones = {(c.computation, c.done): c for c in program.collectives}

    def through(self, computation: str, busy: float, times: int) -> float:
        """Seconds of one run, begun when collectives under way still take `busy` seconds."""
        now, link_free = 0.0, busy
        arrives: dict[str, float] = {}
        for position, line in enumerate(self.module.computations[computation].values()):
            here = (computation, position)
            if start := self.starts.get(here):
                link_free = max(now, link_free) + self.seconds[start.name]
                arrives[start.name] = link_free
            if done := self.dones.get(here):
                exposed = max(0.0, arrives[done.name] - now)
                now += exposed
                before = self.waits.get(done.name, (0.0, 0.0))
                each = (self.seconds[done.name], exposed)
                self.waits[done.name] = (
                    before[0] + times * each[0],
                    before[1] + times * each[1],
                )
            elif _steps_into(line):
                now += self.into(line, max(0.0, link_free - now), times)
            elif not start:
                taken = self.seconds.get(line.scheduling_name, 0.0)
                now += taken
                self.compute += times * taken
        return now

    def into(self, line: Instruction, busy: float, times: int) -> float:
        """Seconds of one run of a loop, a conditional or a call."""
        if line.opcode != "while":
            longest = max(line.calls, key=lambda called: self.through(called, busy, 0))
            return self.through(longest, busy, times)
        trips = self.unknown_trips if line.trips is None else line.trips
        if not trips:
            return 0.0
        first = self.through(line.body, busy, times)
        return first + (trips - 1) * self.through(line.body, 0.0, times * (trips - 1))


def _steps_into(line: Instruction) -> bool:
    return line.opcode in ("while", "conditional", "call")


def _collective_seconds(collective: Collective, rates: Rates) -> float:
    """The two links work side by side."""
    slow, fast = collective.slow_bytes / rates.slow_bytes, collective.fast_bytes / rates.fast_bytes
    return max(slow, fast)


def _seconds(program: Program, computation: str, line: Instruction, rates: Rates) -> float:
    gemms = list(compiled.gemms(program.module, computation, line, program.kernels))
    if gemms:
        return sum(gemm.times * _gemm_seconds(gemm, rates) for gemm in gemms)
    return _traffic(program.module, computation, line) / rates.memory_bytes


def _gemm_seconds(gemm: Gemm, rates: Rates) -> float:
    flops = rates.flops_fp8 if gemm.dtype.startswith("f8") else rates.flops
    return max(gemm.flops / flops, gemm.bytes / rates.memory_bytes)


def _traffic(module: Module, computation: str, line: Instruction) -> int:
    """Bytes that an instruction reads and writes; of an array that it only slices, the slice."""
    if line.opcode in hlo.FREE or line.opcode.endswith("-done"):
        return 0
    if line.opcode == "fusion":
        inside = module.computations[line.calls[0]]
        given = [i for i in inside.values() if i.opcode == "parameter"]
        return sum(_read(inside, i) for i in given) + _written(inside)
    here = module.computations[computation]
    read = sum(_taken(here[name], line) for name in line.operands)
    return read + _put(here, line)


def _read(inside: Computation, parameter: Instruction) -> int:
    users = list(_users(inside, parameter))
    return min(parameter.bytes, sum(_taken(source, user) for source, user in users))


def _users(inside: Computation, line: Instruction) -> Iterable[tuple[Instruction, Instruction]]:
    """(what is used, by what), seen through changes of shape alone."""
    for user in inside.values():
        if line.name in user.operands:
            if user.opcode == "bitcast":
                yield from _users(inside, user)
            else:
                yield line, user


def _taken(source: Instruction, user: Instruction) -> int:
    """Bytes of `source` that `user` reads."""
    first = user.operands[0] == source.name
    if first and user.opcode in ("dynamic-slice", "slice", "gather"):
        return user.bytes
    if first and user.opcode in ("dynamic-update-slice", "scatter"):
        return 0  # what is not replaced stays where it is
    return source.bytes


def _written(inside: Computation) -> int:
    root = next(line for line in inside.values() if line.root)
    results = [inside[n] for n in root.operands] if root.opcode == "tuple" else [root]
    return sum(_put(inside, result) for result in results)


def _put(here: Computation, line: Instruction) -> int:
    """Bytes that an instruction writes."""
    while line.opcode == "bitcast":
        line = here[line.operands[0]]
    if line.opcode == "dynamic-update-slice":
        return here[line.operands[1]].bytes
    if line.opcode == "scatter":
        return here[line.operands[-1]].bytes
    return line.bytes
