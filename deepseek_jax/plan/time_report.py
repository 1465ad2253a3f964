"""Times of a plan as a dictionary and as text: step, ranks, layers, links, cost, assumptions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.parallel.pipeline.schedule import Work
from deepseek_jax.plan import messages, step_time
from deepseek_jax.plan.chunk_time import Chunk, ChunkTimes, forward_and_backward
from deepseek_jax.plan.cost import run_cost
from deepseek_jax.plan.layer_work import layer_work
from deepseek_jax.plan.machine import Machine

CATEGORIES = ("matmuls", "attention core", "FP8 tiles", "all else")
PHASES = {
    Work.FORWARD: "forward",
    Work.INPUT_GRAD: "input gradient",
    Work.WEIGHT_GRAD: "weight gradient",
}


def report(
    config: Config, machine: Machine, *, imbalance: float = 1.0, measured: Sequence[str] = ()
) -> dict[str, Any]:
    """Times of a config on a machine.

    Args:
      config: Config of the run, whose mesh has no -1.
      machine: Machine, with the multiprocessors of messages set.
      imbalance: Rows of experts of the fullest device over the mean.
      measured: Names of the machine's efficiencies that were measured.

    Returns:
      Dictionary with stable keys; seconds, bytes and dollars.
    """
    chunks = step_time.times(config, machine, imbalance=imbalance)
    executions = ("lockstep", "asynchronous") if config.mesh.pipe > 1 else ("one stage",)
    steps = {}
    for execution in executions:
        step = step_time.step_time(chunks, execution)
        steps[step.execution] = {
            "seconds": step.total,
            "pipeline": step.pipeline,
            "update": step.update,
            **dataclasses.asdict(run_cost(config, machine, step)),
            "ranks": [dataclasses.asdict(rank) for rank in step.ranks],
        }
    return {
        "hardware": machine.chip.name,
        "tokens": config.schedule.tokens,
        "imbalance": imbalance,
        "steps": steps,
        "layer": _layer(chunks),
        "links": _links(chunks),
        "assumed": _assumed(machine),
        "measured": list(measured),
        "notes": _notes(config, machine),
    }


def _notes(config: Config, machine: Machine) -> list[str]:
    mesh, node = config.mesh, machine.network.gpus_per_node
    if (inside := mesh.gpu * mesh.tensor) <= node:
        return []
    return [
        f"mesh.gpu={mesh.gpu} x mesh.tensor={mesh.tensor} are {inside} GPUs, and a node of "
        f"{machine.chip.name} has {node}: messages inside a node of the mesh go between nodes."
    ]


def _layer(chunks: ChunkTimes) -> list[dict[str, Any]]:
    """Seconds of one MoE layer, or of a dense one where there is no other, by part and phase."""
    chunk = chunks.layer(dense=not chunks.config.model.moe_layers)
    rows = []
    for phase, name in PHASES.items():
        for part in ("attention", "feed"):
            seconds = getattr(chunk, part)[phase]
            shown = {"feed": "feed-forward"}.get(part, part)
            row = dict(zip(CATEGORIES, seconds.parts, strict=True))
            rows.append({"part": shown, "phase": name, **row, "total": seconds.total})
        rows.append(_messages(chunk, phase, name))
    return [row for row in rows if row["total"]]


def _messages(chunk: Chunk, phase: Work, name: str) -> dict[str, Any]:
    total = chunk.messages[phase] + chunk.waits[phase] + chunk.tensor[phase]
    return {"part": "messages, alone", "phase": name, **dict.fromkeys(CATEGORIES), "total": total}


def _links(chunks: ChunkTimes) -> list[dict[str, Any]]:
    """Bytes and seconds of the messages of one MoE layer's forward and backward, by link.

    "hidden" is the share of a pair's payload under its computation, 0 where nothing overlaps;
    "buffer_bytes" are the bytes of this project's messages, whole buffers with their capacity
    factor.
    """
    config, machine, tokens = chunks.config, chunks.machine, chunks.shape.tokens
    work = layer_work(chunks.shape, dense=False)
    sent = [message for phase in PHASES for message in work.messages[phase]]
    if not sent:
        return []
    buffers = messages.buffers(config, tokens)
    hops = [list(kind) for kind in zip(*buffers.values(), strict=True)]
    links = {
        "between nodes": ("slow_bytes", machine.network.between_bytes_per_s),
        "inside a node": ("fast_bytes", machine.network.inside_bytes_per_s),
    }
    chunk = chunks.layer(dense=False)
    pair = forward_and_backward(chunk, chunk)
    exposed = (pair.exposed + pair.synchronisation) / pair.payload
    hidden = 1 - exposed if step_time.overlaps(config) else 0.0
    rows: list[dict[str, Any]] = []
    runs = step_time.micro_batches(config) * config.model.moe_layers / config.mesh.pipe
    for index, (name, (field, rate)) in enumerate(links.items()):
        size = sum(getattr(message, field) for message in sent)
        if size:
            hop = hops[min(index, len(hops) - 1)]
            rows.append(
                {
                    "link": name,
                    "bytes_of_a_layer": size,
                    "bytes_of_a_step": size * runs,
                    "bytes_per_s": rate,
                    "seconds_alone": size / rate,
                    "seconds_beside_matmuls": size / rate / machine.efficiency.all_to_all,
                    "buffer_bytes": sum(hop),
                    "hidden": max(0.0, hidden),
                }
            )
    return rows


def _assumed(machine: Machine) -> dict[str, Any]:
    return {
        **dataclasses.asdict(machine.efficiency),
        "communication_sms": machine.communication_sms,
        "between_bytes_per_s": machine.network.between_bytes_per_s,
        "inside_bytes_per_s": machine.network.inside_bytes_per_s,
        "dollars_per_hour": machine.chip.dollars_per_hour,
    }
