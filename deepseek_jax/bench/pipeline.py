"""Pipeline on emulated devices: computed chunks beside the schedule, growth, and split backward.

`chunks` runs the executor on a matmul per stage and counts on the host the chunks that each device
computes. `growth` compiles and runs the gradients of a model with one MoE layer per stage for
growing numbers of micro-batches. `halves` splits the backward pass of such a layer into the
gradients of inputs and of weights. The devices share this machine's cores, so that seconds are the
work of all ranks together, with idle ticks included if `layout.ramps` is "mask".
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.aot import layer
from deepseek_jax.config import Config, ConfigError, MeshConfig
from deepseek_jax.model import execution, params
from deepseek_jax.model.overlapped import stage as stages
from deepseek_jax.model.overlapped.stage import Stage
from deepseek_jax.model.params import split
from deepseek_jax.model.transformer import build_model
from deepseek_jax.parallel import axes
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.overlap import Steps, run_to_end
from deepseek_jax.parallel.pipeline import schedule
from deepseek_jax.parallel.pipeline.executor import AXIS, Pipeline
from deepseek_jax.parallel.pipeline.lockstep import BidirectionalStages, lockstep
from deepseek_jax.parallel.pipeline.one_f_one_b import OneFOneB
from deepseek_jax.parallel.pipeline.schedule import Schedule, Work
from deepseek_jax.train.step import make_gradients, tokens_spec

RANKS = (4, 8)
KINDS = ("dualpipe", "dualpipev", "1f1b")
BACKWARD_WORKS = (Work.BACKWARD, Work.INPUT_GRAD)
TIMES = (1, 2, 4)  # micro-batches, as multiples of 2 * ranks
NOTE = "emulated devices on shared cores: seconds are the work of all ranks together"


def measure(config: Config, *, ranks: tuple[int, ...] = RANKS, repeats: int = 5) -> dict[str, Any]:
    """Measures the tables `chunks`, `growth` and `halves`.

    Table `chunks` counts forward and backward chunks of the busiest rank: `planned` by the schedule
    and `ran` on devices. Masked ramps run one of each in every tick, skipped ones only the planned.
    `useful` are the chunks whose result is used, over the planned.

    Table `growth` has `temp_MiB`, the compiled temporaries of one device; `work`, the computed
    chunks; and `seconds`, the median of a step; the last two relative to the first row.

    Table `halves` has compiled FLOPs per recompute policy: `whole` backward pass of a layer,
    `inputs` without weight gradients, `weights` for these, and `halves_of_whole`, the sum of both
    parts over the whole.

    Args:
      config: Recipe; `layout.pipeline` and `layout.ramps` apply to `growth`.
      ranks: Numbers of pipeline ranks.
      repeats: Timings of a step.

    Raises:
      ConfigError: More ranks than devices.
    """
    if max(ranks) > jax.device_count():
        raise ConfigError(
            f"bench pipeline needs {max(ranks)} devices and there are {jax.device_count()}; "
            f"use --emulate_devices={max(ranks)}"
        )
    return {
        "chunks": [
            _counted(kind, n, 3 * n, skip)
            for n in ranks
            for kind in KINDS
            for skip in (False, True)
        ],
        "growth": [row for n in ranks for row in _growth(config, n, repeats)],
        "halves": [_halves(config, recompute) for recompute in ("none", "report", "full")],
        "note": NOTE,
    }


def _executor(made: Schedule, skip: bool) -> tuple[int, Callable[..., Any]]:
    """(ticks of a schedule, its executor's `run` as a function of stages, like and total)."""
    if made.kind == "1f1b":
        plain, count = OneFOneB(made.ranks, skip), made.micro_batches
        return plain.ticks(count), functools.partial(plain.run, count=jnp.int32(count))
    ticks = lockstep(made)
    pipeline = Pipeline(BidirectionalStages(made.ranks, made.stages), ticks.slots, ["fb"], skip)

    def run(stages: Any, like: jax.Array, total: Any) -> Any:
        tables = {name: jnp.asarray(table) for name, table in ticks.tables.items()}
        first, end, count = (jnp.int32(n) for n in (*ticks.steady, ticks.count))
        return pipeline.run(stages, like, total, tables, (first, end, count))

    return ticks.count, run


def _counted(kind: str, ranks: int, micro_batches: int, skip: bool) -> dict[str, Any]:
    """Row of table `chunks`."""
    made = schedule.BY_NAME[kind](ranks, micro_batches)
    ticks, run_all = _executor(made, skip)
    planned = collections.Counter(
        (task.work, rank)
        for rank, program in enumerate(made.programs)
        for step in program
        for task in step
    )
    tally: collections.Counter[tuple[str, int, bool]] = collections.Counter()

    def count(name: str, rank: Any, on: Any) -> None:
        tally[name, int(rank), bool(on)] += 1

    @jax.shard_map(mesh=_mesh(ranks), in_specs=P(), out_specs=P(), check_vma=False)
    def run(weight):
        stages = _Counted(weight, count)
        gradients, _, _ = run_all(stages, weight[:1], jnp.zeros(()))
        return jax.lax.psum(sum(gradients), AXIS)

    jax.block_until_ready(jax.jit(run)(jnp.eye(8) / 2))
    jax.effects_barrier()
    row: dict[str, Any] = {"kind": kind, "ranks": ranks, "micro_batches": micro_batches}
    row |= {"ramps": "skip" if skip else "mask", "ticks": ticks}
    for name, works in (("forward", [Work.FORWARD]), ("backward", BACKWARD_WORKS)):
        each = [sum(planned[work, rank] for work in works) for rank in range(ranks)]
        ran = [tally[name, rank, True] + tally[name, rank, False] for rank in range(ranks)]
        useful = [tally[name, rank, True] for rank in range(ranks)]
        row |= {f"{name}_planned": max(each), f"{name}_ran": max(ran)}
        row[f"{name}_useful"] = sum(useful) / sum(each)
    return row


def _mesh(ranks: int) -> jax.sharding.Mesh:
    return meshes.build(MeshConfig(pipe=ranks, replica=1, node=1, gpu=1, tensor=1))


@dataclasses.dataclass(frozen=True)
class _Counted:
    """Stages of one matmul each, with a host callback for every computed chunk."""

    weight: jax.Array
    count: Any

    def first(self, micro: jax.Array) -> jax.Array:
        return jnp.ones_like(self.weight[:1])

    def forward(self, chunk: int, x: jax.Array, on: jax.Array) -> Steps[Any]:
        jax.debug.callback(self.count, "forward", jax.lax.axis_index(AXIS), on)
        y = yield x @ self.weight
        return y, [x], ()

    def backward(self, chunk: int, kept: Any, d_y: jax.Array, on: jax.Array) -> Steps[Any]:
        jax.debug.callback(self.count, "backward", jax.lax.axis_index(AXIS), on)
        d_x = yield d_y @ self.weight.T
        return d_x, kept[0].T @ d_y, []

    def weight_backward(self, chunk: int, later: Any) -> Any:
        raise AssertionError("no weight gradient is deferred")

    def last(self, micro: jax.Array, y: jax.Array, total: jax.Array) -> tuple[Any, jax.Array]:
        return total + y.sum(), jnp.ones_like(y)

    def first_gradient(self, micro: jax.Array, d_x: jax.Array, total: jax.Array) -> jax.Array:
        return total


def _growth(config: Config, ranks: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of table `growth` for a number of ranks; runs take turns on a shared machine."""
    counts = [2 * ranks * times for times in TIMES]
    made = [_Gradients.compile(_sized(config, ranks, count)) for count in counts]
    seconds = np.median([[one.seconds() for one in made] for _ in range(repeats)], axis=0)
    made_of = schedule.BY_NAME[config.layout.pipeline]
    masked = config.layout.ramps == "mask"
    ticks = [_executor(made_of(ranks, count), not masked)[0] for count in counts]
    work = np.array(ticks if masked else counts)
    return [
        {
            "kind": config.layout.pipeline,
            "ranks": ranks,
            "micro_batches": count,
            "ticks": ticks[i],
            "trace_seconds": made[i].trace_seconds,
            "compile_seconds": made[i].compile_seconds,
            "temp_MiB": made[i].temp_bytes / 2**20,
            "work": float(work[i] / work[0]),
            "seconds": float(seconds[i] / seconds[0]),
        }
        for i, count in enumerate(counts)
    ]


def _sized(config: Config, ranks: int, micro_batches: int) -> Config:
    sequences = 2 * micro_batches
    stages = 2 * ranks if config.layout.pipeline == "dualpipev" else ranks
    sizes: dict[str, Any] = dict(
        vocab=256, layers=stages, dense_layers=0, d_model=128, heads=2, q_latent=64, kv_latent=32,
        d_nope=32, d_rope=16, d_value=32, experts=8, shared_experts=1, top_k=2, groups=2,
        top_groups=1, d_expert=128, mtp_depth=0,
    )  # fmt: skip
    mesh = dataclasses.replace(config.mesh, pipe=ranks, replica=1, node=1, gpu=1, tensor=1)
    batch = dict(length=128, sequences=sequences, ramp_sequences=sequences, micro_sequences=2)
    layout: dict[str, Any] = dict(
        zero=0, dispatch="two_hop", micro_batches_in_flight=1, stage_layers=()
    )
    return dataclasses.replace(
        config,
        mesh=mesh,
        model=dataclasses.replace(config.model, **sizes),
        batch=dataclasses.replace(config.batch, **batch),
        layout=dataclasses.replace(config.layout, attention_block=128, loss_chunk=256, **layout),
        precision=dataclasses.replace(config.precision, recipe="float32"),
    )


def _halves(config: Config, recompute: str) -> dict[str, Any]:
    """Row of table `halves`: an MoE layer on one device, without overflow rounds.

    It has one expert, as wide as those of a token, whose rows are one block of the grouped matmul:
    XLA counts the body of a loop once, however often it runs.
    """
    sized = _sized(config, 1, 1)
    width = sized.model.top_k * sized.model.d_expert
    one: dict[str, Any] = dict(experts=1, top_k=1, groups=1, top_groups=1, d_expert=width)
    sized = dataclasses.replace(sized, model=dataclasses.replace(sized.model, **one))
    options = dataclasses.replace(sized.layout, recompute=recompute, capacity_factor=100.0)
    sized = dataclasses.replace(sized, layout=options)
    how, on = execution.of(sized), jnp.bool_(True)
    graph, weights, rest = layer.abstract(sized, how)
    x = jax.ShapeDtypeStruct(
        (2, sized.batch.length, sized.model.d_model), how.recipe.activation_dtype
    )

    def stage(defer: bool, weights: Any, rest: Any) -> Stage:
        slot = stages.single_layer(nnx.merge(graph, weights, rest))
        return stages.Stage([slot], how, sized.model.experts, jnp.float32(0), defer)

    def kept_of(weights: Any, rest: Any, x: Any) -> Any:
        return run_to_end(stage(False, weights, rest).forward(x, on))[1]

    def whole_of(kept: Any, weights: Any, rest: Any, x: Any) -> Any:
        return run_to_end(stage(False, weights, rest).backward(kept, x, on))[:2]

    def inputs_of(kept: Any, weights: Any, rest: Any, x: Any) -> Any:
        d_x, _, later = run_to_end(stage(True, weights, rest).backward(kept, x, on))
        return d_x, later

    def rest_of(later: Any, weights: Any, rest: Any) -> Any:
        return stage(True, weights, rest).weight_backward(later)

    def flops(run: Any, *given: Any) -> float:
        counted: Any = jax.jit(run).lower(*given).compile().cost_analysis()
        return float(counted["flops"])

    with axes.active(meshes.layout(sized)):
        given: Any = weights, rest, x
        kept = jax.eval_shape(kept_of, *given)
        later = jax.eval_shape(inputs_of, kept, *given)[1]
        whole, inputs = (flops(run, kept, *given) for run in (whole_of, inputs_of))
        others = flops(rest_of, later, weights, rest)
    return {
        "recompute": recompute,
        "whole": whole,
        "inputs": inputs,
        "weights": others,
        "halves_of_whole": (inputs + others) / whole,
    }


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """Compiled gradient program with its arguments."""

    run: Any
    given: Any
    trace_seconds: float
    compile_seconds: float
    temp_bytes: int

    @classmethod
    def compile(cls, config: Config) -> "_Gradients":
        mesh, layout = meshes.build(config.mesh), meshes.layout(config)
        _, weights, bias = split(build_model(config.model, jax.random.key(0)))
        places = params.place(weights, lambda *a: NamedSharding(mesh, layout.storage(*a)))
        count = config.batch.sequences // config.batch.micro_sequences
        shape = count, config.batch.micro_sequences, config.batch.length + 1
        tokens = np.random.default_rng(0).integers(0, config.model.vocab, shape, np.int32)
        with jax.set_mesh(mesh):
            weights = jax.device_put(weights, places)
            tokens = jax.device_put(tokens, NamedSharding(mesh, tokens_spec(layout)))
            given = weights, bias, tokens, jnp.int32(count), jnp.float32(0.3)
            begin = time.perf_counter()
            lowered = jax.jit(make_gradients(config, layout, mesh)).lower(*given)
            traced = time.perf_counter()
            compiled = lowered.compile()
            done = time.perf_counter()
        analysis = compiled.memory_analysis()
        assert analysis is not None  # CPU and GPU both have one
        made = cls(compiled, given, traced - begin, done - traced, analysis.temp_size_in_bytes)
        made.seconds()
        return made

    def seconds(self) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(self.run(*self.given))
        return time.perf_counter() - begin
