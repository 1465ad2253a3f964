"""Ticks of a pipelined training step, read from a program compiled for a virtual cluster.

The body of the loop over ticks has two ticks, one of each parity (1F1B: one tick). It shows the
GEMMs that hide each message, the copies, and by a replay its estimated time. Nothing runs here.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from deepseek_jax.aot import cluster, compiled, cost_model, layer, products
from deepseek_jax.aot.compiled import Collective, Copy, Gemm, Program
from deepseek_jax.aot.cost_model import Rates
from deepseek_jax.aot.hlo import Array, Computation, Instruction
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.hardware import xla_options
from deepseek_jax.model import execution, params
from deepseek_jax.model.overlapped.layer_pass import hops_of
from deepseek_jax.model.overlapped.stage import Stage, StageChunks, single_layer, turns
from deepseek_jax.parallel import axes
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.pipeline import schedule
from deepseek_jax.parallel.pipeline.executor import BACKWARD, FORWARD, LAST, TICKS, Pipeline
from deepseek_jax.parallel.pipeline.lockstep import BidirectionalStages, lockstep
from deepseek_jax.parallel.pipeline.stage_assignment import stage_map

KERNELS = layer.KERNELS
LARGEST = 12  # number of carried arrays in the report


def lower_alone(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the ticks of a DualPipe with one MoE layer per stage, without embedding and head.

    The program compiles quickly, and its messages overlap as in a pipeline of any depth.

    Args:
      config: Config of the run.
      mesh: Real or virtual mesh (`cluster.mesh`) of the sizes of `config.mesh`.

    Raises:
      ConfigError: A pipeline that is not DualPipe or DualPipeV.
    """
    held, layout = stage_map(config), meshes.layout(config)
    if not isinstance(held, BidirectionalStages):
        raise ConfigError(
            f"layout.pipeline={config.layout.pipeline} has one chunk in a tick, not two; set "
            "layout.pipeline=dualpipe or layout.pipeline=dualpipev"
        )
    how = dataclasses.replace(execution.of(config), in_flight=1)
    graph, weights, rest = layer.abstract(config, how)
    one = params.place(weights, lambda names, _: layout.spec(names))
    made = schedule.BY_NAME[config.layout.pipeline](config.mesh.pipe, 2 * config.mesh.pipe)
    ticks = lockstep(made, config.layout.defer_weight_gradients)
    like: Any = jax.ShapeDtypeStruct(
        (1, config.batch.length, config.model.d_model), how.recipe.activation_dtype
    )

    def local(weights, rest, tables):
        with axes.active(layout):
            blocks = [nnx.merge(graph, each, rest) for each in weights]
            of_stages = how, config.model.experts, jnp.float32(0)
            defer = config.layout.defer_weight_gradients
            run = _LayersOnly(
                [Stage([single_layer(block)], *of_stages, defer) for block in blocks], like
            )
            edges: Any = tuple(jnp.int32(tick) for tick in (*ticks.steady, ticks.count))
            pipeline = Pipeline(held, ticks.slots, turns(1, hops_of(how)), skip=False)
            return pipeline.run(run, like, jnp.float32(0), tables, edges)[0]

    specs = (one, one), P(), P()
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    given = (weights, weights), rest, ticks.tables
    with jax.set_mesh(mesh):
        return jax.jit(mapped).lower(*layer.placed(mesh, specs, given))


@dataclasses.dataclass(frozen=True)
class _LayersOnly(StageChunks):
    """Stages of MoE layers whose first input is zeros and whose loss is the sum of the outputs."""

    like: Any

    def first(self, micro: jax.Array) -> jax.Array:
        return jnp.zeros(self.like.shape, self.like.dtype)

    def last(self, micro: jax.Array, y: jax.Array, total: Any) -> tuple[Any, jax.Array]:
        return total + y.sum(dtype=jnp.float32), jnp.ones_like(y)

    def first_gradient(self, micro: jax.Array, d_x: jax.Array, total: Any) -> Any:
        return total


@dataclasses.dataclass(frozen=True)
class Pair:
    """Pair of ticks in the loop body of a compiled program (1F1B: one tick), or the model's end.

    Attributes:
      computation: Name in the program.
      messages: All-to-alls of the MoE layers.
      copies: Arrays that are copied, largest first.
      kept: Arrays that the loop carries from one pair to the next: type and shape -> count.
      seconds: Estimated seconds, from a replay.
      compute: Part of `seconds` in which the device computes.
      travelling: Estimated seconds of the messages.
      exposed: Part of `travelling` in which the device only waits.
    """

    computation: str
    messages: tuple[Collective, ...]
    copies: tuple[Copy, ...]
    kept: Mapping[Array, int]
    seconds: float
    compute: float
    travelling: float
    exposed: float

    @property
    def hidden_share(self) -> float:
        """Share of the messages' time that is hidden behind computation, 0 to 1."""
        return 1 - self.exposed / self.travelling


def costs(program: Program, rates: Rates) -> dict[str, float]:
    """`cost_model.costs` of a middle rank without overflow rounds.

    The loops of unknown length in a tick are overflow rounds and the model's end: 0 trips here.
    """
    return cost_model.costs(program, rates, unknown_trips=0)


def read(program: Program, rates: Rates) -> Pair:
    """Steady pair of ticks: the loop body with the most all-to-alls."""
    messages = [c for c in program.collectives if c.kind == "all-to-all"]
    bodies = [c.computation for c in messages if c.inside == "while"]
    body = max(bodies, key=bodies.count)
    loop = next(
        line
        for computation in program.module.computations.values()
        for line in computation.values()
        if line.opcode == "while" and line.body == body
    )
    return _replayed(program, rates, body, collections.Counter(loop.arrays))


def read_last(program: Program, rates: Rates) -> Pair | None:
    """End of the model (MTP and head); None if it has no messages to experts."""
    for each in program.collectives:
        if each.kind == "all-to-all" and f"/{LAST}/" in each.op_name:
            return _replayed(program, rates, each.computation, {})
    return None


def _replayed(program: Program, rates: Rates, computation: str, kept: Mapping[Array, int]) -> Pair:
    timeline = cost_model.replay(program, costs(program, rates), computation, unknown_trips=0)
    here = {c.name: c for c in program.collectives if c.computation == computation}
    messages = {name: c for name, c in here.items() if c.kind == "all-to-all"}
    waits = [wait for wait in timeline.waits if wait.collective.name in messages]
    return Pair(
        computation=computation,
        messages=tuple(messages.values()),
        copies=tuple(c for c in program.copies if c.computation == computation),
        kept=kept,
        seconds=timeline.total,
        compute=timeline.compute,
        travelling=sum(wait.seconds for wait in waits),
        exposed=sum(wait.exposed for wait in waits),
    )


def under(message: Collective) -> list[Gemm]:
    """GEMMs that hide a message, without the tiny ones of counting and sorting."""
    return [gemm for gemm in message.gemms if gemm.flops > 1e9]


def of_other_chunk(message: Collective, gemm: Gemm) -> bool:
    """True if one of message and GEMM is of the forward chunk and the other of the backward."""
    return {_chunk(message.op_name), _chunk(gemm.op_name)} == {FORWARD, BACKWARD}


def under_the_other(pair: Pair) -> int:
    """Number of messages that a GEMM of the other chunk hides."""
    return sum(any(of_other_chunk(m, g) for g in under(m)) for m in pair.messages)


def _chunk(op_name: str) -> str:
    """Chunk of an operation: FORWARD, BACKWARD, or empty for neither."""
    return next((part for part in op_name.split("/") if part in (FORWARD, BACKWARD)), "")


def dependences(program: Program, computation: str) -> list[tuple[str, str]]:
    """Dependences between the forward and the backward chunk of one tick, which forbid overlap.

    Returns:
      (instruction, label) of each instruction that needs a value of the other chunk; the label
      names its tick and chunk, such as "even/forward".
    """
    labels = [f"{tick}/{chunk}" for tick in TICKS for chunk in (FORWARD, BACKWARD)]
    other = {f"{t}/{FORWARD}": f"{t}/{BACKWARD}" for t in TICKS}
    other |= {backward: forward for forward, backward in other.items()}
    needs: dict[str, set[str]] = {}
    varying: set[str] = set()
    found, lines = [], program.module.computations[computation]
    for line in lines.values():
        operands, op_name = _made_of(program, lines, line)
        above = set().union(*(needs[name] for name in operands))
        if line.opcode == "parameter" or not varying.isdisjoint(operands):
            varying.add(line.name)  # other values depend on constants only, and XLA shares them
        own = next((x for x in labels if f"/{x}/" in op_name and line.name in varying), None)
        if own and other[own] in above:
            found.append((line.name, own))
        needs[line.name] = above | {own} if own else above
    return found


def _made_of(
    program: Program, lines: Computation, line: Instruction
) -> tuple[tuple[str, ...], str]:
    """(operands of an instruction, operation of the Python program that it comes from).

    An element of an optimization barrier, or of a fusion of several like operations, has only its
    own operands.
    """
    if line.opcode != "get-tuple-element":
        several = line.opcode in ("tuple", "fusion") and len(line.arrays) > 1
        return line.operands, "" if several else line.op_name
    whole = lines[line.operands[0]]
    if whole.opcode == "parameter":  # such as a weight, named after one of its uses
        return line.operands, ""
    if whole.opcode == "tuple":
        return (whole.operands[line.index],), line.op_name
    if whole.opcode != "fusion":
        return line.operands, line.op_name
    inside = program.module.computations[whole.calls[0]]
    root = next(each for each in inside.values() if each.root)
    element = inside[root.operands[line.index]] if root.opcode == "tuple" else root
    reached, ahead = {element.name}, [element]
    while ahead:
        for name in ahead.pop().operands:
            if name not in reached:
                reached.add(name)
                ahead.append(inside[name])
    given = [each for each in inside.values() if each.opcode == "parameter"]
    numbers = [each.index for each in given if each.name in reached]
    return tuple(whole.operands[number] for number in numbers), element.op_name


def measure(
    config: Config, lower: Callable[[Config, Mesh], jax.stages.Lowered], file: Path | None = None
) -> dict[str, Any]:
    """Compiles a step for the virtual cluster, with the compiler's costs and with `cost_model`'s.

    Memory is compiled and times are estimated (`cost_model.py`); nothing is measured.

    Args:
      config: Config of the run.
      lower: Function that lowers a training step, `train.step.lower`.
      file: Path to write `cost_model`'s costs to, for `layout.cost_profile`; None for no file.

    Returns:
      Peak and carried memory, rows on the ticks and on the model's end, the Hopper kernels by name
      (a loop's body counts once), and the carried arrays.

    Raises:
      ConfigError: No pipeline, no messages to experts, a bad path, or a missing compiler.
    """
    if config.mesh.pipe == 1:
        raise ConfigError("plan step needs a pipeline; set mesh.pipe above 1")
    if not meshes.layout(config).mesh_axes("experts"):
        raise ConfigError(
            "plan step needs messages to experts, and on this layout every device has all experts; "
            "set mesh.node or mesh.gpu above 1"
        )
    if file and file.suffix != xla_options.SUFFIX:
        raise ConfigError(f"--costs={file} must end in {xla_options.SUFFIX}, or XLA ignores it")
    if file and not file.absolute().parent.is_dir():
        raise ConfigError(f"--costs={file}: there is no folder {file.absolute().parent}")
    mesh, rates = cluster.mesh(config.mesh), Rates()
    lowered = lower(config, mesh)
    first = compiled.read(cluster.compile_for(lowered), mesh, KERNELS)
    text = cost_model.text(costs(first, rates))
    if file:
        file.write_text(text)
    second = compiled.read(cluster.compile_for(lowered, profile=text), mesh, KERNELS)
    programs = {"the compiler's": first, "ours": second}
    both = {name: read(program, rates) for name, program in programs.items()}
    lasts = {name: read_last(program, rates) for name, program in programs.items()}
    ticks = "one tick" if config.layout.pipeline == "1f1b" else "two ticks"
    held = both["ours"].kept
    largest = sorted(held, key=lambda array: -array.bytes * held[array])[:LARGEST]
    expected = second.workspace_bytes / 2**30
    return {
        "peak_GiB": second.peak_bytes / 2**30,
        **({"attention_workspace_GiB": expected} if expected else {}),  # beside the peak, estimated
        "carried_GiB": sum(array.bytes * n for array, n in held.items()) / 2**30,
        ticks: [
            {"costs": name, **_row(pair), "under_the_other": under_the_other(pair)}
            for name, pair in both.items()
        ],
        "the end": [{"costs": name, **_row(last)} for name, last in lasts.items() if last],
        "kernels": [
            {"kernel": name, "in_the_text": count}
            for name, count in sorted(products.kernel_counts(second.module).items())
        ],
        "carried": [
            {
                "array": f"{array.dtype}[{', '.join(map(str, array.shape))}]",
                "arrays": held[array],
                "GiB": array.bytes * held[array] / 2**30,
            }
            for array in largest
        ],
    }


def _row(pair: Pair) -> dict[str, Any]:
    each = [(message, under(message)) for message in pair.messages]
    return {
        "messages": len(each),
        "asynchronous": sum(not message.is_sync for message, _ in each),
        "under_a_gemm": sum(bool(gemms) for _, gemms in each),
        "hidden": pair.hidden_share,
        "milliseconds": 1e3 * pair.seconds,
        "compute": 1e3 * pair.compute,
        "largest_copy_MiB": max((copy.bytes for copy in pair.copies), default=0) / 2**20,
    }
