"""Seconds of a training step, from the times of chunks: pipeline, bubbles, optimizer, totals.

Two executions of a schedule are timed. `asynchronous`: every rank runs its own list of steps, each
as soon as its inputs are there, as published systems do. `lockstep`: this project's executor, in
which all ranks run a forward and a backward chunk in every tick, empty layer slots included, and
wait for the slowest; heads and loss follow in every other tick.
"""

import collections
import dataclasses
import functools
import itertools
import math
from typing import Any

from deepseek_jax.config import Config, layers_per_stage, stage_count
from deepseek_jax.model.flops import training_flops_per_token
from deepseek_jax.parallel.pipeline import lockstep, one_f_one_b
from deepseek_jax.parallel.pipeline import schedule as schedules
from deepseek_jax.parallel.pipeline.schedule import Schedule, Step, Work
from deepseek_jax.parallel.pipeline.timeline import simulate
from deepseek_jax.plan.chunk_time import (
    FORWARD,
    INPUTS,
    WEIGHTS,
    Chunk,
    ChunkTimes,
    forward_and_backward,
    overlapped,
)
from deepseek_jax.plan.layer_work import DeviceShare
from deepseek_jax.plan.machine import Machine
from deepseek_jax.plan.update_time import update_seconds, weight_messages_seconds

NAMES = {
    Work.FORWARD: "forward",
    Work.INPUT_GRAD: "backward",
    Work.BACKWARD: "backward",
    Work.WEIGHT_GRAD: "weight_gradient",
}


@dataclasses.dataclass(frozen=True)
class RankTime:
    """Seconds of one pipeline rank in a step.

    Attributes:
      forward, backward, weight_gradient: Chunks that overlap with nothing; a backward may hold
        both gradients.
      pairs: Overlapped forwards and backwards.
      exposed: Part of all these in which the rank waits for messages.
      bubble: Time without a chunk.
    """

    forward: float
    backward: float
    weight_gradient: float
    pairs: float
    exposed: float
    bubble: float


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
      execution: "asynchronous", "lockstep" or "one stage".
      ranks: Times of each pipeline rank.
      pipeline: Seconds from the first forward to the last backward.
      update: Optimizer, and messages of gradients and weights that the pipeline does not hide.
      tokens: Tokens of the step.
      devices: Number of devices.
    """

    execution: str
    ranks: tuple[RankTime, ...]
    pipeline: float
    update: float
    tokens: int
    devices: int

    @property
    def total(self) -> float:
        return self.pipeline + self.update

    @property
    def tokens_per_device_second(self) -> float:
        return self.tokens / self.total / self.devices

    def flops_per_device_second(self, config: Config, *, causal: bool) -> float:
        """Model FLOP/s of a device: without recomputation, MTP and routing."""
        each = training_flops_per_token(config.model, config.batch.length, causal=causal)
        return each * self.tokens_per_device_second


@dataclasses.dataclass(frozen=True)
class StageCosts:
    """Costs of steps by the chunks of their stages.

    Attributes:
      chunks: Chunk of each stage.
      found: Seconds of the steps asked for before, whole and exposed.
    """

    chunks: tuple[Chunk, ...]
    found: dict[tuple[Any, ...], tuple[float, float]] = dataclasses.field(default_factory=dict)

    def of(self, step: Step) -> float:
        """Seconds of a step."""
        return self._seconds(step)[0]

    def exposed(self, step: Step) -> float:
        """Seconds of a step in which the rank waits for messages."""
        return self._seconds(step)[1]

    def _seconds(self, step: Step) -> tuple[float, float]:
        key = tuple((task.work, task.stage) for task in step)
        if key not in self.found:
            self.found[key] = self._computed(step)
        return self.found[key]

    def _computed(self, step: Step) -> tuple[float, float]:
        chunk, work = self.chunks[step[0].stage], step[0].work
        if len(step) > 1:
            both = forward_and_backward(chunk, self.chunks[step[1].stage])
            return both.total, both.exposed + both.synchronisation
        works = (INPUTS, WEIGHTS) if work is Work.BACKWARD else (work,)
        exposed = sum(chunk.exposed_alone(each) for each in works)
        return sum(chunk.alone(each) for each in works), exposed


def times(
    config: Config, machine: Machine, *, attention: str = "mla", imbalance: float = 1.0
) -> ChunkTimes:
    """Times of chunks of a config whose mesh has no -1."""
    mesh = config.mesh
    parts = mesh.replica * mesh.node * mesh.gpu
    tokens = config.batch.micro_sequences * config.batch.length // parts
    return ChunkTimes(DeviceShare(config, tokens, attention, imbalance), machine)


def step_time(chunks: ChunkTimes, execution: str = "asynchronous") -> StepTime:
    """Seconds of one step.

    Args:
      chunks: Times of the config's chunks.
      execution: "asynchronous" or "lockstep"; without a pipeline they are the same.
    """
    config = chunks.config
    if config.mesh.pipe == 1:
        ranks, seconds, execution = (*_one_stage(chunks), "one stage")
    elif execution == "lockstep" and config.layout.pipeline == "1f1b":
        ranks, seconds = _lockstep_one_way(chunks)
    elif execution == "lockstep":
        ranks, seconds = _lockstep(chunks)
    else:
        ranks, seconds = _asynchronous(chunks, config.layout.pipeline)
        execution = "asynchronous"
    return StepTime(
        execution,
        ranks,
        seconds,
        update_seconds(config, chunks.machine, chunks.shape.attention),
        config.batch.sequences * config.batch.length,
        math.prod(dataclasses.astuple(config.mesh)),
    )


def overlaps(config: Config) -> bool:
    """Whether messages of one micro-batch travel beside the computation of another."""
    if config.mesh.pipe > 1:
        return config.layout.pipeline.startswith("dualpipe")
    return config.layout.micro_batches_in_flight == 2 and micro_batches(config) > 1


def micro_batches(config: Config) -> int:
    """Micro-batches of a full step."""
    return config.batch.sequences // config.batch.micro_sequences


def stages(chunks: ChunkTimes) -> tuple[Chunk, ...]:
    """The chunk of each stage of the pipeline."""
    config = chunks.config
    number = stage_count(config.layout.pipeline, config.mesh.pipe)
    counts = layers_per_stage(config.model.layers, number, config.layout.stage_layers)
    starts = itertools.accumulate(counts, initial=0)
    found = []
    for stage, (start, count) in enumerate(zip(starts, counts, strict=False)):
        dense = min(max(config.model.dense_layers - start, 0), count)
        ends = ["embedding"] * (stage == 0) + ["heads"] * (stage == number - 1)
        found.append(chunks.chunk((dense, count - dense), ends))
    return tuple(found)


def build(config: Config, kind: str) -> Schedule:
    """Schedule of a step, with the least number of micro-batches that the schedule runs.

    Raises:
      ConfigError: Ranks that the schedule does not support.
    """
    many, ranks = micro_batches(config), config.mesh.pipe
    least = 2 * ranks if kind.startswith("dualpipe") else 1
    return _built(kind, ranks, max(least, many + (many % 2 if kind == "dualpipe" else 0)))


@functools.lru_cache(maxsize=64)
def _built(kind: str, ranks: int, many: int) -> Schedule:
    return schedules.BY_NAME[kind](ranks, many)


def _asynchronous(chunks: ChunkTimes, kind: str) -> tuple[tuple[RankTime, ...], float]:
    built, costs = build(chunks.config, kind), StageCosts(stages(chunks))
    line = simulate(built, costs, hop_seconds(chunks))
    found = []
    for program, bubble in zip(built.programs, line.bubbles, strict=True):
        spent: dict[str, float] = collections.defaultdict(float)
        for step in program:
            spent["pairs" if len(step) > 1 else NAMES[step[0].work]] += costs.of(step)
        exposed = sum(map(costs.exposed, program))
        found.append(
            RankTime(
                forward=spent["forward"],
                backward=spent["backward"],
                weight_gradient=spent["weight_gradient"],
                pairs=spent["pairs"],
                exposed=exposed,
                bubble=bubble,
            )
        )
    return tuple(found), line.makespan


def hop_seconds(chunks: ChunkTimes) -> float:
    """Seconds in which a micro-batch's activations reach the next pipeline rank."""
    size, links = 2 * chunks.shape.tokens * chunks.config.model.d_model, chunks.machine.network
    inside = math.prod(dataclasses.astuple(chunks.config.mesh)) <= links.gpus_per_node
    return size / (links.inside_bytes_per_s if inside else links.between_bytes_per_s)


def _lockstep(chunks: ChunkTimes) -> tuple[tuple[RankTime, ...], float]:
    config = chunks.config
    built = build(config, config.layout.pipeline)
    defer = config.layout.defer_weight_gradients
    ticks = _ticks(built.kind, built.ranks, built.micro_batches, defer)
    counts = layers_per_stage(config.model.layers, built.stages, config.layout.stage_layers)
    full = chunks.chunk((0, max(counts)))
    tick = forward_and_backward(full, full)
    ends = chunks.chunk((0, 0), ("embedding", "heads"))
    last = overlapped(
        [(ends, FORWARD), (ends, INPUTS), (ends, WEIGHTS)]
    ).total  # MTP's messages under the heads
    hop = hop_seconds(chunks)
    busy = 3 * built.micro_batches * built.stages / built.ranks  # F, I and W of every chunk
    total = ticks * (tick.total + hop) + micro_batches(config) / 2 * last
    useful = busy / 3 * tick.total
    exposed = ticks * (tick.exposed + tick.synchronisation + hop)
    rank = RankTime(0.0, 0.0, 0.0, useful, exposed, total - useful)
    return (rank,) * built.ranks, total


@functools.lru_cache(maxsize=256)
def _ticks(kind: str, ranks: int, many: int, defer: bool) -> int:
    """Ticks of a step in lockstep."""
    return lockstep.lockstep(_built(kind, ranks, many), defer).count


def _lockstep_one_way(chunks: ChunkTimes) -> tuple[tuple[RankTime, ...], float]:
    """1F1B in lockstep: a forward and then a backward in every tick, and the heads in each."""
    config, ranks = chunks.config, chunks.config.mesh.pipe
    counts = layers_per_stage(config.model.layers, ranks, config.layout.stage_layers)
    full = chunks.chunk((0, max(counts)))
    ends = chunks.chunk((0, 0), ("embedding", "heads"))
    many, phases = micro_batches(config), (FORWARD, INPUTS, WEIGHTS)
    ticks = one_f_one_b.OneFOneB(ranks, skip=False).ticks(many)
    last = overlapped([(ends, phase) for phase in phases]).total
    hop = 2 * hop_seconds(chunks)
    useful = many * sum(full.alone(phase) for phase in phases)
    total = ticks * (useful / many + hop) + many * last
    exposed = ticks * (sum(full.exposed_alone(phase) for phase in phases) + hop)
    forward = many * full.alone(FORWARD)
    rank = RankTime(forward, useful - forward, 0.0, 0.0, exposed, total - useful)
    return (rank,) * ranks, total


def _one_stage(chunks: ChunkTimes) -> tuple[tuple[RankTime, ...], float]:
    config = chunks.config
    dense = config.model.dense_layers
    whole = chunks.chunk((dense, config.model.layers - dense), ("embedding", "heads"))
    many = micro_batches(config)
    if overlaps(config):
        forward = overlapped([(whole, FORWARD)] * 2)
        backward = overlapped([(whole, INPUTS), (whole, WEIGHTS)] * 2)
        each = [part.total / 2 for part in (forward, backward)]
        exposed = sum(part.exposed + part.synchronisation for part in (forward, backward)) / 2
    else:
        each = [whole.alone(FORWARD), whole.alone(INPUTS) + whole.alone(WEIGHTS)]
        exposed = sum(whole.exposed_alone(phase) for phase in (FORWARD, INPUTS, WEIGHTS))
    gathered = weight_messages_seconds(config, chunks.machine)
    rank = RankTime(many * each[0], many * each[1], 0.0, 0.0, many * (exposed + gathered), 0.0)
    return (rank,), many * (sum(each) + gathered)
