"""Lower bound of the seconds of a step, in microseconds of work: what a search orders layouts by.

A rank computes its chunks of every micro-batch, waits for the synchronisation of their messages,
and sends their payload. However chunks overlap, this takes at least the longer of computation and
payload, and the waits; without overlap it takes the sum. The optimizer is left out, and so are
bubbles, but for the way of the first micro-batch to the rank.
"""

import functools
import itertools

import numpy as np

from deepseek_jax.config import Config, layers_per_stage, stage_count
from deepseek_jax.parallel.pipeline.lockstep import BidirectionalStages
from deepseek_jax.parallel.pipeline.one_f_one_b import LinearStages
from deepseek_jax.plan import machine_lookup, step_time
from deepseek_jax.plan.chunk_time import FORWARD, PHASES, Chunk
from deepseek_jax.plan.machine import Machine

# Seconds of a forward and a backward of one micro-batch, one column each: computation of the
# forward, and of both; its part that a second stream can take in a pair; messages, alone on the
# links; synchronisation, and messages between ranks that share a width.
FORWARD_COMPUTE, COMPUTE, CONCURRENT, PAYLOAD, WAITS = range(5)


class TimeBound:
    """Lower bounds on one machine of configs that differ in layout, batch and precision alone."""

    def __init__(self, machine: Machine, execution: str):
        self._machine, self._execution = machine, execution
        self._loads: dict[tuple[object, ...], np.ndarray] = {}

    def seconds(self, config: Config) -> float:
        """Lower bound of a step of a config whose mesh has no -1, without the optimizer."""
        parts, many = self._part_loads(config), step_time.micro_batches(config)
        model, layout, pipe = config.model, config.layout, config.mesh.pipe
        if pipe == 1:
            counts = np.array([model.dense_layers, model.moe_layers, 1, 1])
            overlap = layout.micro_batches_in_flight == 2 and many > 1
            return many * float(_least(counts @ parts, overlap=overlap))
        kind = layout.pipeline
        many = many if kind == "1f1b" else max(many, 2 * pipe)
        if self._execution == "lockstep" and kind != "1f1b":
            stages = stage_count(kind, pipe)
            most = max(layers_per_stage(model.layers, stages, layout.stage_layers))
            tick = _least(most * parts[1], overlap=True)
            return many * stages / pipe * float(tick)  # a tick for each forward of a rank
        held, before = _parts_of_ranks(
            kind, pipe, model.layers, model.dense_layers, layout.stage_layers
        )
        both_ways = 0.5 if kind == "dualpipe" else 1.0
        work = _least(both_ways * many * held @ parts, overlap=kind != "1f1b")
        return float((before @ parts[:, FORWARD_COMPUTE] + work).max())

    def _part_loads(self, config: Config) -> np.ndarray:
        """Loads of a dense and an MoE layer, of the embedding and of the heads: [part, column]."""
        mesh, layout, precision = config.mesh, config.layout, config.precision
        sequences = config.batch.micro_sequences // (mesh.replica * mesh.node * mesh.gpu)
        replica = mesh.replica if "replica" in layout.rules.get("experts", ()) else 1
        key = (
            sequences, replica, mesh.node, mesh.gpu, mesh.tensor, layout.dispatch,
            layout.recompute, layout.communication_sms, precision.recipe,
        )  # fmt: skip
        if key not in self._loads:
            machine = machine_lookup.with_messages(self._machine, config)
            chunk = step_time.times(config, machine).chunk
            ends = [chunk((0, 0), (end,)) for end in ("embedding", "heads")]
            chunks = [chunk((1, 0)), chunk((0, 1)), *ends]
            self._loads[key] = np.array([_load(each) for each in chunks])
        return self._loads[key]


def _load(chunk: Chunk) -> tuple[float, ...]:
    waits = sum(chunk.waits.values()) + sum(chunk.tensor.values())
    compute = sum(map(chunk.compute, PHASES))
    payload = sum(chunk.messages.values())
    return chunk.compute(FORWARD), compute, chunk.concurrent, payload, waits


def _least(load: np.ndarray, *, overlap: bool) -> np.ndarray:
    """Least seconds of loads on one device."""
    compute, payload, waits = load[..., COMPUTE], load[..., PAYLOAD], load[..., WAITS]
    if not overlap:
        return compute + payload + waits
    return np.maximum(compute - load[..., CONCURRENT], payload) + waits


@functools.lru_cache(maxsize=256)
def _parts_of_ranks(
    kind: str, pipe: int, layers: int, dense_layers: int, given: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Dense layers, MoE layers, embedding and heads of each rank, and of the stages before it.

    Returns:
      [rank, part] each; the stages before it are those on the way from the nearer end.
    """
    stages = stage_count(kind, pipe)
    assigned = LinearStages(pipe) if kind == "1f1b" else BidirectionalStages(pipe, stages)
    counts = layers_per_stage(layers, stages, given)
    parts = np.zeros((stages, 4))
    starts = itertools.accumulate(counts, initial=0)
    for stage, (start, count) in enumerate(zip(starts, counts, strict=False)):
        dense = min(max(dense_layers - start, 0), count)
        parts[stage] = dense, count - dense, stage == 0, stage == stages - 1
    held, before = np.zeros((pipe, 4)), np.zeros((pipe, 4))
    for rank in range(pipe):
        on_rank = [assigned.stage(rank, chunk) for chunk in range(assigned.chunks)]
        held[rank] = parts[on_rank].sum(0)
        before[rank] = parts[: min(on_rank)].sum(0)
    return held, before
