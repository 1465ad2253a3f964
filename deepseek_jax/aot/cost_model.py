"""Cost model of a compiled program at assumed rates, for XLA's scheduler and for a replay.

All times are estimated: a GEMM takes its FLOPs at a sustained rate, a collective its bytes over the
link of its hop, any other instruction its memory traffic. XLA's scheduler reads these costs in its
own profile format and then starts collectives early enough; its built-in estimate starts them too
late. On a GPU, a measured profile is better. On an H100, `bench layer` measured 0.93 of the
estimated time of attention at V3's sizes, and 0.96 of that of a whole layer.
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
    """Sustained rates of one H800, assumed, per second.

    They are about 60 % of the peak of 989 TFLOP/s (FP8: twice that) and 75 % of 3.35 TB/s; links as
    the report counts them (section 3.2.2).

    Attributes:
      flops: FLOP/s of GEMMs in 16-bit formats.
      flops_fp8: FLOP/s of GEMMs in FP8.
      memory_bytes: Bytes/s of device memory.
      slow_bytes: Bytes/s between nodes, InfiniBand.
      fast_bytes: Bytes/s inside a node, NVLink.
    """

    flops: float = 600e12
    flops_fp8: float = 1200e12
    memory_bytes: float = 2.5e12
    slow_bytes: float = _LINKS.infiniband_bytes_per_s
    fast_bytes: float = _LINKS.nvlink_effective_bytes_per_s or _LINKS.nvlink_bytes_per_s


@dataclasses.dataclass(frozen=True)
class Wait:
    """Time of one collective in a replay, summed over its runs.

    Attributes:
      collective: The collective.
      seconds: Time it takes.
      exposed: Part of `seconds` in which the device only waits for it.
    """

    collective: Collective
    seconds: float
    exposed: float

    @property
    def hidden(self) -> float:
        """Part of `seconds` in which the device computes."""
        return self.seconds - self.exposed


@dataclasses.dataclass(frozen=True)
class ReplayedTimeline:
    """Replay of a program on one device.

    Attributes:
      total: Seconds of the program.
      compute: Seconds of computation; the device waits for the rest of `total`.
      waits: Time of each collective.
    """

    total: float
    compute: float
    waits: tuple[Wait, ...]

    @property
    def exposed(self) -> float:
        """Seconds in which the device only waits for collectives."""
        return sum(wait.exposed for wait in self.waits)

    @property
    def hidden_share(self) -> float:
        """Share of the collectives' time that is hidden behind computation, 0 to 1."""
        seconds = sum(wait.seconds for wait in self.waits)
        return 1 - self.exposed / seconds if seconds else 1.0


def compile_profiled(
    lowered: jax.stages.Lowered,
    mesh: Mesh,
    rates: Rates | None = None,
    kernels: Kernels | None = None,
    options: Mapping[str, Any] | None = None,
) -> jax.stages.Compiled:
    """Compiles, estimates the cost of each instruction, and compiles again with these costs.

    Args:
      lowered: As in `cluster.compile_for`.
      mesh: As in `compiled.read`.
      rates: Rates of a device; None for an H800.
      kernels: As in `compiled.read`.
      options: As in `cluster.compile_for`.
    """
    first = compiled.read(cluster.compile_for(lowered, options), mesh, kernels)
    return cluster.compile_for(lowered, options, text(costs(first, rates or Rates())))


def costs(program: Program, rates: Rates, unknown_trips: int = 1) -> dict[str, float]:
    """Seconds of one run of each instruction, by scheduler name; instructions of 0 s are left out.

    A loop costs the replay of its body times its trips; a conditional costs its longest branch.

    Args:
      program: Compiled program.
      rates: Rates of a device.
      unknown_trips: Trips of a loop whose number of trips the compiler does not know.
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
    """Costs in the profile format that `cluster.compile_for` hands to XLA."""
    return "".join(f'costs {{ name: "{n}" cost_us: {s * 1e6!r} }}\n' for n, s in seconds.items())


def parse(profile: str) -> dict[str, float]:
    """Seconds by instruction, from a profile that `text` wrote."""
    found = re.findall(r'costs \{ name: "([^"]*)" cost_us: (\S+) \}', profile)
    return {name: float(cost_us) / 1e6 for name, cost_us in found}


def replay(
    program: Program, seconds: Mapping[str, float], computation: str = "", unknown_trips: int = 1
) -> ReplayedTimeline:
    """Simulates the schedule: computation in order, beside one collective at a time.

    Not modelled: the SMs that a collective takes from a GEMM, launches, and NCCL's start-up.

    Args:
      program: Compiled program.
      seconds: Seconds of one run of each instruction, estimated by `costs` or measured.
      computation: Computation to replay once, such as a loop's body; "" for the whole program.
      unknown_trips: As in `costs`.
    """
    run = _Replay(program, seconds, unknown_trips)
    total = run.through(computation or program.module.entry, 0.0, 1)
    waits = tuple(Wait(c, *run.waits[c.name]) for c in program.collectives if c.name in run.waits)
    return ReplayedTimeline(total, run.compute, waits)


class _Replay:
    """Walk through computations that sums their times; `times` is the number of runs of each."""

    def __init__(self, program: Program, seconds: Mapping[str, float], unknown_trips: int) -> None:
        self.module, self.seconds, self.compute = program.module, seconds, 0.0
        self.unknown_trips = unknown_trips
        self.waits: dict[str, tuple[float, float]] = {}  # seconds, exposed seconds
        self.starts = {(c.computation, c.start): c for c in program.collectives}
        self.dones = {(c.computation, c.done): c for c in program.collectives}

    def through(self, computation: str, busy: float, times: int) -> float:
        """Seconds of one run that starts while earlier collectives still take `busy` seconds."""
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
    """Seconds of a collective, whose traffic over both links runs in parallel."""
    slow, fast = collective.slow_bytes / rates.slow_bytes, collective.fast_bytes / rates.fast_bytes
    return max(slow, fast)


def _seconds(program: Program, computation: str, line: Instruction, rates: Rates) -> float:
    """Seconds of an instruction that is no collective and calls no computation."""
    gemms = list(compiled.gemms(program.module, computation, line, program.kernels))
    if gemms:
        return sum(gemm.times * _gemm_seconds(gemm, rates) for gemm in gemms)
    return _traffic(program.module, computation, line) / rates.memory_bytes


def _gemm_seconds(gemm: Gemm, rates: Rates) -> float:
    flops = rates.flops_fp8 if gemm.dtype.startswith("f8") else rates.flops
    return max(gemm.flops / flops, gemm.bytes / rates.memory_bytes)


def _traffic(module: Module, computation: str, line: Instruction) -> int:
    """Bytes that an instruction reads and writes; a sliced array counts the slice only."""
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
    """Bytes that a fusion reads of one of its parameters."""
    users = list(_users(inside, parameter))
    return min(parameter.bytes, sum(_taken(source, user) for source, user in users))


def _users(inside: Computation, line: Instruction) -> Iterable[tuple[Instruction, Instruction]]:
    """Yields (value, user) of each use of `line`, through bitcasts."""
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
        return 0  # updated in place
    return source.bytes


def _written(inside: Computation) -> int:
    """Bytes that a fusion writes."""
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
