"""The trace of V3's training that its authors published, and the plan of the same work beside it.

deepseek-ai/profile-data, train.json (commit 4496024): H800, one GPU of 64, 4,096 tokens, a forward
of four MoE layers overlapped with the backward of four, balanced by force, no pipeline messages.
The sums below are those of its kernel events, by part, phase and category; the names of the phases
are ours. Most efficiencies are fitted to them (`hardware/efficiency.py`), so an error here is no
error of a prediction, but shows how well one number per category describes the trace.
"""

import dataclasses
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.hardware.chips import H800
from deepseek_jax.hardware.network import H800 as H800_LINKS
from deepseek_jax.parallel.pipeline.schedule import Work
from deepseek_jax.plan.chunk_time import ChunkTimes, forward_and_backward
from deepseek_jax.plan.layer_work import DeviceShare
from deepseek_jax.plan.machine import Machine

LAYERS, TOKENS, COMMUNICATION_SMS = 4, 4096, 20

# Milliseconds of one layer: matmul, attention core, FP8 casts, all else.
TRACE: dict[tuple[str, Work], tuple[float, float, float, float]] = {
    ("attention", Work.FORWARD): (1.67, 1.24, 0.46, 0.99),
    ("feed", Work.FORWARD): (3.29, 0.0, 0.37, 0.94),
    ("attention", Work.INPUT_GRAD): (2.27, 4.25, 1.13, 1.69),
    ("feed", Work.INPUT_GRAD): (3.20, 0.0, 0.91, 1.20),
    ("attention", Work.WEIGHT_GRAD): (2.39, 0.0, 0.0, 0.0),
    ("feed", Work.WEIGHT_GRAD): (6.38, 0.0, 0.0, 0.0),
}
PAYLOAD = {Work.FORWARD: 4.35 + 6.4, Work.INPUT_GRAD: 6.0 + 3.4}  # milliseconds of a layer
PAIR, COMPUTE = 129.0, 118.2  # milliseconds of a pair, and of its computing stream's work
FITTED = (
    "weight gradients, attention core, casts, all else, messages beside matmuls, synchronisation, "
    "second stream; not the other matmuls, which are DeepGEMM's"
)

H800_MACHINE = Machine(H800, H800_LINKS, communication_sms=COMMUNICATION_SMS)


@dataclasses.dataclass(frozen=True)
class Compared:
    """A published number beside the plan's, in one unit."""

    name: str
    predicted: float
    published: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.published - 1

    def row(self) -> dict[str, Any]:
        """Dictionary for tables and JSON."""
        return {**dataclasses.asdict(self), "error": self.error}


def trace_config(config: Config) -> Config:
    """A config with the recomputation of the trace."""
    layout = dataclasses.replace(config.layout, recompute="report")
    return dataclasses.replace(config, layout=layout)


def compare_trace(config: Config) -> list[Compared]:
    """Rows of the trace, in milliseconds.

    Args:
      config: V3's, `configs/v3_671b.py`.
    """
    times = ChunkTimes(DeviceShare(trace_config(config), TOKENS), H800_MACHINE)
    layer, rows = times.layer(dense=False), []
    for (part, phase), published in TRACE.items():
        found = getattr(layer, part)[phase].parts
        categories = ("matmuls", "attention core", "casts", "all else")
        for name, ours, theirs in zip(categories, found, published, strict=True):
            if theirs:
                rows.append(Compared(f"{part} {phase.value}, {name}", 1e3 * ours, theirs))
    for phase, theirs in PAYLOAD.items():
        rows.append(Compared(f"payload {phase.value}", 1e3 * layer.busy[phase], theirs))
    chunk = times.chunk((0, LAYERS))
    pair = forward_and_backward(chunk, chunk)
    rows.append(Compared("pair, computation", 1e3 * pair.compute, COMPUTE))
    rows.append(Compared("pair", 1e3 * pair.total, PAIR))
    return rows
