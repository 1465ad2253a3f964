"""Collectives, GEMMs and copies of a compiled program, read from its text.

Nothing here is measured. "Overlapped" means that the schedule starts a GEMM between the start and
the done instruction of a collective.
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
from deepseek_jax.kernels import attention_cudnn

KINDS = (
    "all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
HOST_AXES = ("gpu", "tensor")  # innermost axes, inside a host; the other axes cross hosts
_ATTENTION = "__cudnn$fmha"  # begin of the names of cuDNN's calls
_ONLY_COPIES = hlo.FREE | {"copy"}

# Name of a Pallas kernel -> FLOPs as a function of its arguments; the compiled text has no FLOPs.
Kernels = Mapping[str, Callable[[tuple[Array, ...]], float]]


@dataclasses.dataclass(frozen=True)
class Gemm:
    """A matrix multiplication or an attention of a compiled program.

    Attributes:
      name: Name of the instruction.
      op_name: Operation of the Python program that it comes from.
      op: Name of the library call, "dot", or name of the Pallas kernel.
      flops: Operations of one run; a multiply-add counts two.
      bytes: Bytes of arguments and result.
      dtype: Type of the first argument, as XLA spells it; of a kernel, of its first float matrix.
      times: Runs per run of the calling instruction; a loop of unknown length counts one.
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
    """Collective of a compiled program; bytes are those of one device and one run.

    Attributes:
      name: Name of the instruction in the scheduler.
      op_name: Operation of the Python program that it comes from.
      kind: One of KINDS.
      computation: Computation that contains it.
      inside: Caller of that computation: "entry", "while", "conditional" or "call".
      times: Runs in one run of the program; None in a loop whose length the compiler does not know.
      start: Position of the start in the computation's schedule.
      done: Position of the done; equal to `start` for a single instruction.
      is_sync: True if the device waits for it at once.
      bytes: Bytes of the input.
      axes: Mesh axes along which the partners differ.
      group: Devices that exchange, this one included.
      slow_bytes: Bytes sent to other hosts.
      fast_bytes: Bytes sent inside the host.
      gemms: GEMMs that start between `start` and `done`.
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
        """True if a GEMM can run during the exchange."""
        return not self.is_sync and bool(self.gemms)


@dataclasses.dataclass(frozen=True)
class Copy:
    """An array that is copied on its device.

    Attributes:
      name: Name of the instruction.
      op_name: Operation of the Python program that it comes from.
      computation: Computation that contains it.
      times: Runs, as in `Collective`.
      bytes: Bytes of the array.
    """

    name: str
    op_name: str
    computation: str
    times: int | None
    bytes: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      module: Parsed text.
      collectives: All collectives, by computation, in schedule order.
      copies: Copies, largest first.
      kernels: Pallas kernels that count as GEMMs.
      peak_bytes: Compiled peak memory of one device. XLA does not count cuDNN's workspace, NCCL's
        buffers and the CUDA context, and compiles a program that exceeds the device without error.
    """

    module: Module
    collectives: tuple[Collective, ...]
    copies: tuple[Copy, ...]
    kernels: Kernels
    peak_bytes: int

    @property
    def workspace_bytes(self) -> int:
        """Memory that cuDNN is expected to take beside `peak_bytes`, for one call: estimated."""
        lines = (line for each in self.module.computations.values() for line in each.values())
        backward = (line for line in lines if line.target.startswith(_ATTENTION) and _five(line))
        return max((_workspace(line) for line in backward), default=0)

    @property
    def gemms(self) -> tuple[Gemm, ...]:
        """All GEMMs, with `times` counting runs in one run of the program."""
        entry = self.module.entry
        lines = self.module.computations[entry].values()
        return tuple(g for line in lines for g in gemms(self.module, entry, line, self.kernels))


def read(compiled: jax.stages.Compiled, mesh: Mesh, kernels: Kernels | None = None) -> Program:
    """Reads a program that `cluster.compile_for` returned.

    Args:
      compiled: Compiled program.
      mesh: Mesh that it was compiled for.
      kernels: Pallas kernels that count as GEMMs, by a part of their `op_name`; other kernels count
        as memory traffic.
    """
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text and memory, "XLA's GPU compiler has both"
    module = hlo.parse(text)
    found = collectives(module, mesh.shape, kernels)
    return Program(module, found, copies(module), kernels or {}, memory.peak_memory_in_bytes)


def collectives(
    module: Module, mesh: Mapping[str, int], kernels: Kernels | None = None
) -> tuple[Collective, ...]:
    """Collectives of a module.

    Args:
      module: Parsed text of a program.
      mesh: Axis -> devices along it, outermost first.
      kernels: Pallas kernels that count as GEMMs.
    """
    found = []
    for computation, (inside, times) in scheduled(module).items():
        lines = list(module.computations[computation].values())
        begun: dict[str, int] = {}  # instruction of an async collective -> position of its start
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
    """Computations with a schedule, callers first -> (kind of caller, number of runs)."""
    runs: dict[str, tuple[str, int | None]] = {module.entry: ("entry", 1)}
    for computation in list(module.computations)[::-1]:  # the text has callees before callers
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
    """Bytes that a device sends (to other hosts, inside its host).

    The `group` devices of the collective are spread evenly over `hosts`. An all-to-all sends each
    partner its part. In gathers and reductions, every part crosses to each host once and is
    forwarded there. A permute uses the slower link.
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
    """Kind of collective that an instruction starts, ends or performs; empty for all others."""
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
    """Yields the GEMMs of an instruction: itself, or those of the computations that it calls."""
    own = gemm(line, module.inputs(computation, line), kernels or {})
    if own:
        yield own
    for called in line.calls:
        times = line.trips if called == line.body and line.trips is not None else 1
        for inner in module.computations[called].values():
            for each in gemms(module, called, inner, kernels):
                yield dataclasses.replace(each, times=times * each.times)


def copies(module: Module) -> tuple[Copy, ...]:
    """Copies and fusions that only copy, largest first."""
    found = []
    for computation, (_, times) in scheduled(module).items():
        for line in module.computations[computation].values():
            inner = [i.opcode for name in line.calls for i in module.computations[name].values()]
            fused = line.opcode == "fusion" and "copy" in inner and _ONLY_COPIES.issuperset(inner)
            if line.opcode in ("copy", "copy-done") or fused:
                found.append(Copy(line.name, line.op_name, computation, times, line.bytes))
    return tuple(sorted(found, key=lambda copy: -copy.bytes))


def _inner(module: Module, line: Instruction) -> Instruction:
    """Instruction that an `async-start` wraps; any other instruction itself."""
    if line.opcode != "async-start":
        return line
    return next(i for i in module.computations[line.calls[0]].values() if i.root)


def _payload(module: Module, computation: str, line: Instruction, kind: str) -> tuple[Array, ...]:
    """Arrays that are sent, without the output buffer and the sizes of a ragged all-to-all."""
    arrays = module.inputs(computation, line)
    return arrays[:1] if kind == "ragged-all-to-all" else arrays


def _partners(devices: np.ndarray, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int, int]:
    """(mesh axes that differ inside a group, devices of a group, hosts of a group)."""
    places = np.unravel_index(devices, tuple(mesh.values()))
    axes = tuple(n for n, p in zip(mesh, places, strict=True) if (p != p[:, :1]).any())
    host = np.sort(devices // math.prod(mesh.get(axis, 1) for axis in HOST_AXES), axis=1)
    hosts = 1 + (np.diff(host, axis=1) != 0).sum(1).max(initial=0)
    return axes, devices.shape[1] if axes else 1, int(hosts)


def gemm(line: Instruction, inputs: tuple[Array, ...], kernels: Kernels) -> Gemm | None:
    """The GEMM that an instruction with these inputs is; None for other instructions."""
    op, flops = line.target or line.opcode, None
    if op == "dot":
        flops = _dot_flops(inputs[0], line.arrays[0], line.dimensions("lhs_contracting_dims"))
    elif op.startswith("__cublas"):
        summed = line.dimensions("lhs_contracting_dimensions")
        flops = _dot_flops(inputs[0], line.arrays[0], summed)
    elif op.startswith(_ATTENTION):
        flops = _attention_flops(line, inputs)
    elif line.target:
        op = next((name for name in line.op_name.split("/") if name in kernels), "")
        flops = kernels[op](inputs) if op else None
    if flops is None:
        return None
    matrices = [array for array in inputs if re.match(r"bf\d|f\d", array.dtype)]  # no tables
    return Gemm(line.name, line.op_name, op, flops, _bytes(line, inputs), matrices[0].dtype)


def _bytes(line: Instruction, inputs: tuple[Array, ...]) -> int:
    """Bytes of arguments and results, without the library's workspace."""
    results = [a for a in line.arrays if not (line.target and a.dtype in ("s8", "u8"))]
    return sum(array.bytes for array in (*inputs, *results))


def _dot_flops(left: Array, result: Array, summed: tuple[int, ...]) -> float:
    return 2.0 * result.elements * math.prod(left.shape[dim] for dim in summed)


def _attention_flops(line: Instruction, inputs: tuple[Array, ...]) -> float:
    """FLOPs of cuDNN's attention: two products forward, five backward with recomputed scores."""
    batch, heads, queries, keys = line.dimensions("dimensions")
    width, value_width = inputs[0].shape[-1], inputs[2].shape[-1]
    summed = 3 * width + 2 * value_width if _five(line) else width + value_width
    causal = re.search(r'"mask_type":\s*"CAUSAL"', line.attributes)
    return (1.0 if causal else 2.0) * batch * heads * queries * keys * summed


def _five(line: Instruction) -> bool:
    """Whether a call of cuDNN's attention has backward's five products."""
    return line.target.endswith("Backward")


def _workspace(line: Instruction) -> int:
    """Bytes that backward is expected to need; its first result is the queries' gradient, BHSX."""
    return attention_cudnn.workspace_bytes(line.arrays[0].shape)
