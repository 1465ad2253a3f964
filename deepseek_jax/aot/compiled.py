"""What a compiled program moves between devices, and what it computes meanwhile.

Nothing here is measured. "Overlapped" means that the schedule starts a GEMM between a collective's
start and its done.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.aot import hlo
from deepseek_jax.aot.hlo import Array, Instruction, Module

KINDS = (
    "all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
HOST_AXES = ("gpu", "tensor")  # innermost; along any other axis a device is on another host
_ONLY_COPIES = hlo.FREE | {"copy"}

# Name of a Pallas kernel -> FLOPs from its arguments, which the compiled text does not hold.
Kernels = Mapping[str, Callable[[tuple[Array, ...]], float]]


@dataclasses.dataclass(frozen=True)
class Gemm:
    """Something that keeps the matrix units busy.

    Attributes:
      name, op_name: as of a `Collective`.
      op: what it is in the compiled program: a library call, "dot", or a Pallas kernel's name.
      flops: of one run, a multiply-add counting two.
      bytes: arguments and result of one run.
      dtype: of the first argument, in XLA's words.
      times: runs for each run of the place it was found from; a loop of unknown length counts one.
    """

    name: str
    op_name: str
    op: str
    flops: float
    bytes: int
    dtype: str
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices; bytes are those of one device and one run.

    Attributes:
      name, op_name: what the scheduler calls it, and where it comes from in the Python program.
      kind: one of KINDS.
      computation: where it is.
      inside: what runs that computation: "entry", "while", "conditional", "call".
      times: runs in one run of the program; None in a loop whose length the compiler does not know.
      start, done: positions in the computation's schedule; equal when one instruction does all.
      is_sync: the device waits for it right away.
      bytes: what goes in.
      axes: the mesh axes along which partners differ.
      group: how many devices exchange, itself counted.
      slow_bytes, fast_bytes: what has to be sent to other hosts, and inside the host.
      gemms: what is started between start and done.
    """

    name: str
    op_name: str
    kind: str
    computation: str
    inside: str
    times: int | None
    start: int
    done: int
    is_sync: bool
    bytes: int
    axes: tuple[str, ...]
    group: int
    slow_bytes: float
    fast_bytes: float
    gemms: tuple[Gemm, ...]

    @property
    def overlapped(self) -> bool:
        """Whether a GEMM can run while it travels."""
        return not self.is_sync and bool(self.gemms)


@dataclasses.dataclass(frozen=True)
class Copy:
    """An array that is copied on its device: `times` as in `Collective`."""

    name: str
    op_name: str
    computation: str
    times: int | None
    bytes: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      module: its text, parsed.
      collectives: every exchange, computation by computation in schedule order.
      copies: largest first.
      kernels: as given to `read`.
      peak_bytes: memory of one device at the worst moment. XLA does not count cuDNN's workspace,
        NCCL's buffers and the CUDA context, and compiles what exceeds the device without an error.
    """

    module: Module
    collectives: tuple[Collective, ...]
    copies: tuple[Copy, ...]
    kernels: Kernels
    peak_bytes: int

    @property
    def gemms(self) -> tuple[Gemm, ...]:
        """Every GEMM, with its runs in one run of the program."""
        entry = self.module.entry
        lines = self.module.computations[entry].values()
        return tuple(g for line in lines for g in gemms(self.module, entry, line, self.kernels))


def read(compiled: jax.stages.Compiled, mesh: Mesh, kernels: Kernels | None = None) -> Program:
    """Reads what `cluster.compile_for` returned.

    Args:
      mesh: the one it was compiled for.
      kernels: the Pallas kernels that count as GEMMs, by the `name` given to `pallas_call`; others
        count as memory traffic.
    """
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text and memory, "XLA's GPU compiler has both"
    module = hlo.parse(text)
    found = collectives(module, mesh.shape, kernels)
    return Program(module, found, copies(module), kernels or {}, memory.peak_memory_in_bytes)


def collectives(
    module: Module, mesh: Mapping[str, int], kernels: Kernels | None = None
) -> tuple[Collective, ...]:
    """Every exchange of a module.

    Args:
      mesh: axis -> devices along it, outermost first.
    """
    found = []
    for computation, (inside, times) in scheduled(module).items():
        lines = list(module.computations[computation].values())
        begun: dict[str, int] = {}  # an instruction of an async exchange -> position of its start
        for position, line in enumerate(lines):
            kind, stage = kind_of(module, computation, line), line.opcode.rpartition("-")[2]
            if not kind:
                continue
            if stage in ("update", "done"):
                begun[line.name] = begun[line.operands[0]]
            else:
                begun[line.name] = position
            if stage in ("start", "update"):
                continue
            first = begun[line.name]
            start, between = lines[first], lines[first + 1 : position]
            inner = _inner(module, start)
            size = sum(array.bytes for array in _payload(module, computation, start, kind))
            axes, group, hosts = _partners(hlo.groups(inner, math.prod(mesh.values())), mesh)
            slow, fast = traffic(kind, size, group, hosts)
            during = (gemms(module, computation, other, kernels) for other in between)
            found.append(
                Collective(
                    name=start.scheduling_name,
                    op_name=start.op_name or inner.op_name,
                    kind=kind,
                    computation=computation,
                    inside=inside,
                    times=times,
                    start=first,
                    done=position,
                    is_sync=first == position or '"is_sync":true' in start.attributes,
                    bytes=size,
                    axes=axes,
                    group=group,
                    slow_bytes=slow,
                    fast_bytes=fast,
                    gemms=tuple(itertools.chain.from_iterable(during)),
                )
            )
    return tuple(found)


def scheduled(module: Module) -> dict[str, tuple[str, int | None]]:
    """Each computation that devices step through: what runs it, and how often; callers first."""
    runs: dict[str, tuple[str, int | None]] = {module.entry: ("entry", 1)}
    for computation in list(module.computations)[::-1]:  # the text has what is called first
        if computation not in runs:
            continue
        times = runs[computation][1]
        for line in module.computations[computation].values():
            if line.opcode == "fusion" or line.opcode.startswith("async-"):
                continue
            for called in line.calls:
                trips = line.trips if line.opcode == "while" else 1
                more = None if times is None or trips is None else times * trips
                before = runs.get(called, ("", 0))[1]
                total = None if more is None or before is None else before + more
                runs[called] = (line.opcode, total)
    return runs


def traffic(kind: str, bytes_in: int, group: int, hosts: int) -> tuple[float, float]:
    """What one of `group` devices, spread evenly over `hosts`, sends to other hosts and in its own.

    An all-to-all sends each partner its part. Of gathers and reductions every part crosses to each
    host once, and is passed on there; a permute takes the slower of its links.
    """
    near = group // hosts
    if kind.endswith("all-to-all"):
        return bytes_in * (group - near) / group, bytes_in * (near - 1) / group
    if kind in ("collective-permute", "collective-broadcast"):
        return (float(bytes_in), 0.0) if hosts > 1 else (0.0, float(bytes_in) * (group > 1))
    part = {"all-gather": bytes_in, "reduce-scatter": bytes_in / group}
    each = part.get(kind, 2 * bytes_in / group)
    return each * (hosts - 1), each * (group - hosts)


def kind_of(module: Module, computation: str, line: Instruction) -> str:
    """Which of KINDS an instruction starts, ends or does; empty for all others."""
    if line.opcode in ("async-update", "async-done"):
        line = module.computations[computation][line.operands[0]]
        return kind_of(module, computation, line)
    opcode = _inner(module, line).opcode
    for ending in ("-start", "-update", "-done"):
        opcode = opcode.removesuffix(ending)
    return opcode if opcode in KINDS else ""


def gemms(
    module: Module, computation: str, line: Instruction, kernels: Kernels | None = None
) -> Iterator[Gemm]:
    """The GEMMs that an instruction runs: itself, or those of the computations that it calls."""
    own = _gemm(line, module.inputs(computation, line), kernels or {})
    if own:
        yield own
    for called in line.calls:
        times = line.trips if called == line.body and line.trips is not None else 1
        for inner in module.computations[called].values():
            for gemm in gemms(module, called, inner, kernels):
                yield dataclasses.replace(gemm, times=times * gemm.times)


def copies(module: Module) -> tuple[Copy, ...]:
    """Plain copies and the fusions that only copy, largest first."""
    found = []
    for computation, (_, times) in scheduled(module).items():
        for line in module.computations[computation].values():
            inner = [i.opcode for name in line.calls for i in module.computations[name].values()]
            fused = line.opcode == "fusion" and "copy" in inner and _ONLY_COPIES.issuperset(inner)
            if line.opcode in ("copy", "copy-done") or fused:
                found.append(Copy(line.name, line.op_name, computation, times, line.bytes))
    return tuple(sorted(found, key=lambda copy: -copy.bytes))


def _inner(module: Module, line: Instruction) -> Instruction:
    """What an `async-start` wraps; any other instruction itself."""
    if line.opcode != "async-start":
        return line
    return next(i for i in module.computations[line.calls[0]].values() if i.root)


def _payload(module: Module, computation: str, line: Instruction, kind: str) -> tuple[Array, ...]:
    """What is sent: a ragged all-to-all is also given its result's buffer and the sizes."""
    arrays = module.inputs(computation, line)
    return arrays[:1] if kind == "ragged-all-to-all" else arrays


def _partners(devices: np.ndarray, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int, int]:
    """The axes that differ inside the groups, the devices of one, and the hosts that it is on."""
    places = np.unravel_index(devices, tuple(mesh.values()))
    axes = tuple(n for n, p in zip(mesh, places, strict=True) if (p != p[:, :1]).any())
    host = np.sort(devices // math.prod(mesh.get(axis, 1) for axis in HOST_AXES), axis=1)
    hosts = 1 + (np.diff(host, axis=1) != 0).sum(1).max(initial=0)
    return axes, devices.shape[1] if axes else 1, int(hosts)


def _gemm(line: Instruction, inputs: tuple[Array, ...], kernels: Kernels) -> Gemm | None:
    op, flops = line.target or line.opcode, None
    if op == "dot":
        flops = _dot_flops(inputs[0], line.arrays[0], line.dimensions("lhs_contracting_dims"))
    elif op.startswith("__cublas"):
        summed = line.dimensions("lhs_contracting_dimensions")
        flops = _dot_flops(inputs[0], line.arrays[0], summed)
    elif op.startswith("__cudnn$fmha"):
        flops = _attention_flops(line, inputs)
    elif line.target:
        op = next((name for name in line.op_name.split("/") if name in kernels), "")
        flops = kernels[op](inputs) if op else None
    if flops is None:
        return None
    return Gemm(line.name, line.op_name, op, flops, _bytes(line, inputs), inputs[0].dtype)


def _bytes(line: Instruction, inputs: tuple[Array, ...]) -> int:
    """Arguments and results, without the library's workspace."""
    results = [a for a in line.arrays if not (line.target and a.dtype in ("s8", "u8"))]
    return sum(array.bytes for array in (*inputs, *results))


def _dot_flops(left: Array, result: Array, summed: tuple[int, ...]) -> float:
    return 2.0 * result.elements * math.prod(left.shape[dim] for dim in summed)


def _attention_flops(line: Instruction, inputs: tuple[Array, ...]) -> float:
    """cuDNN's attention: two products forward; five backward, the scores being computed again."""
    batch, heads, queries, keys = line.dimensions("dimensions")
    width, value_width = inputs[0].shape[-1], inputs[2].shape[-1]
    backward = line.target.endswith("Backward")
    summed = 3 * width + 2 * value_width if backward else width + value_width
    causal = re.search(r'"mask_type":\s*"CAUSAL"', line.attributes)
    return (1.0 if causal else 2.0) * batch * heads * queries * keys * summed
