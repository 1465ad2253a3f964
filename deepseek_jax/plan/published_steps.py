"""Published training steps of real clusters beside what the plan says of the same layout.

Nothing here is fitted to any of these steps. Where a source leaves a fact open, the row says what
is assumed. Tensor parallelism with sequence parallelism is planned as a part of the tokens on each
device, which has the same operations, and the messages of the gathered sequences.

The two rows of NeMo were 15 and 25 % too fast at first. What has been corrected since was looked
for because of that, and is read from sources other than these steps:

- FP8: Megatron computes all weight gradients on one stream (a second one came with
  NVIDIA/Megatron-LM pull request 3795, March 2026); each message hides under one part of the other
  micro-batch (`chunk_time.py`), and hides nowhere in the warm-up of the schedule; DeepEP has the 20
  SMs of Megatron's default then.
- 25.04: token dropping, which NVIDIA/NeMo scripts/performance/llm/pretrain_deepseek_v3.py
  (7a8f1cc) switches on, works with the all-to-all of NCCL alone (there,
  nemo/lightning/pytorch/callbacks/moe_token_drop.py, 0067c7b). That sends a copy of a token for
  each of its experts, at the bandwidth of `network.H100_NCCL`.

The steps on 512 GPUs and on GB200 were planned only after that. The latter is a failure, and says
which term the plan lacks: time in which kernels wait for the host.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.hardware import chips, network
from deepseek_jax.hardware.efficiency import PUBLISHED, efficiency
from deepseek_jax.plan import step_time
from deepseek_jax.plan.chunk_time import (
    FORWARD,
    INPUTS,
    WEIGHTS,
    Chunk,
    ChunkTimes,
    forward_and_backward,
)
from deepseek_jax.plan.machine import Machine
from deepseek_jax.plan.published_trace import H800_MACHINE, Compared, trace_config
from deepseek_jax.plan.update_time import update_seconds

CORRECTED = (
    "NeMo's rows were corrected after errors of -15 and -25 % had been seen, from sources other\n"
    "than these steps (plan/published_steps.py); those on 512 H100 and on GB200 were planned later."
)


@dataclasses.dataclass(frozen=True)
class PublishedStep:
    """A published step beside the plan's.

    Attributes:
      name: System, devices and format.
      source: Document.
      seconds: Seconds of the step.
      parts: Parts of it, where published.
      assumed: What the source leaves open.
    """

    name: str
    source: str
    seconds: Compared
    parts: tuple[Compared, ...]
    assumed: str

    def row(self) -> dict[str, Any]:
        """Dictionary for tables and JSON."""
        return {
            "name": self.name,
            "source": self.source,
            **{key: value for key, value in self.seconds.row().items() if key != "name"},
            "parts": [part.row() for part in self.parts],
            "assumed": self.assumed,
        }


def published_steps(v3: Config, moonlight: Config) -> list[PublishedStep]:
    """All rows.

    Args:
      v3, moonlight: Configs of the two models, `configs/v3_671b.py` and `configs/moonlight_16b.py`.
    """
    rows = [deepseek(v3), megatron_bf16(v3), megatron_fp8(v3)]
    rows += [nemo_one_chunk(v3, 16, 52.04), nemo_one_chunk(v3, 8, 48.948)]
    return [*rows, megatron_moonlight(moonlight), nemo_gb200(v3)]


def deepseek(v3: Config) -> PublishedStep:
    """V3's own training, whose split is that of a rank at an end of the pipeline."""
    times = _times(trace_config(v3), H800_MACHINE)
    step = step_time.step_time(times)
    end = step.ranks[0]
    parts = (
        Compared("forward alone, 1F", end.forward, 1.13),
        Compared("backward alone, 1B", end.backward, 1.99),
        Compared("weight gradient alone, 1W", end.weight_gradient, 0.48),
        Compared("overlapped, 1F1B", end.pairs, 13.95),
        Compared("bubble", end.bubble, 2.06),
        Compared("optimizer", step.update, 0.29),
    )
    return PublishedStep(
        "DeepSeek, 2,048 H800, FP8",
        "Insights into DeepSeek-V3 (arXiv 2505.09343), training table; the split from memory of it",
        Compared("step, s", step.total, 19.926),
        parts,
        "four layers in each stage but the last, which has one, MTP and the heads",
    )


def megatron_bf16(v3: Config) -> PublishedStep:
    """Megatron-Bridge, all-to-alls not overlapped."""
    config = _megatron(v3, recipe="bfloat16", sequences=16_384)
    times = _times(config, Machine(chips.H100, network.H100), TENSOR)
    return PublishedStep(
        "Megatron-Bridge, 1,024 H100, BF16",
        "NVIDIA-NeMo/Megatron-Bridge, docs/model-verification/models/deepseek-v3.md (d5d8c19)",
        Compared("step, s", interleaved(times, overlap=False), 61.756),
        (),
        "grouped matmuls as fast as this project's; HybridEP at DeepEP's bandwidth",
    )


def megatron_fp8(v3: Config) -> PublishedStep:
    """NeMo 25.09, blockwise FP8, all-to-alls overlapped; 330 TFLOP/s at 260 GFLOP a token."""
    return PublishedStep(
        "NeMo, 1,024 H100, FP8",
        "NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary.md (df0289c), NeMo 25.09",
        Compared("step, s", interleaved(megatron_fp8_times(v3), overlap=True), 25.88),
        (),
        "kernels as fast as DeepSeek's; tokens sent in BF16, since Megatron hands DeepEP no FP8 "
        "(NVIDIA/Megatron-LM issue 3578)",
    )


def megatron_fp8_times(v3: Config) -> ChunkTimes:
    """Times of the chunks of `megatron_fp8`."""
    config = _megatron(v3, recipe="fp8", sequences=8192)
    one_stream = dataclasses.replace(PUBLISHED, concurrent_weight_gradient=0.0)
    machine = Machine(chips.H100, network.H100, one_stream, communication_sms=20)
    return _times(config, machine, TENSOR)


def nemo_one_chunk(v3: Config, ranks: int, seconds: float) -> PublishedStep:
    """NeMo 25.04 on DGX Cloud: 1F1B of one chunk a rank, 64 GPUs each, messages not overlapped."""
    machine = Machine(chips.H100, network.H100_NCCL)
    return PublishedStep(
        f"NeMo 25.04, {64 * ranks:,} H100, BF16, {ranks} ranks",
        DGX_CLOUD,
        Compared("step, s", _one_chunk(_megatron_one_chunk(v3, ranks), machine), seconds),
        (),
        "all-to-alls of NCCL as another user of Megatron measured them (DeepEP issue 59); MTP",
    )


def nemo_gb200(v3: Config) -> PublishedStep:
    """The same on 256 GB200, whose experts are in one rack; it computes the attention core again.

    A failure of the plan. NeMo 25.11 trains 3.3 times as fast on the same chips (3,139 tokens/s
    of a GPU against 958, docs/performance-summary.md), so most of this step is no work of the GPU.
    """
    config = _megatron_one_chunk(v3, 4)
    config = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, node=1, gpu=64),
        layout=dataclasses.replace(config.layout, recompute="attention"),
    )
    machine = Machine(chips.GB200, network.GB200, efficiency("gb200"))
    return PublishedStep(
        "NeMo 25.04, 256 GB200, BF16, 4 ranks",
        DGX_CLOUD,
        Compared("step, s", _one_chunk(config, machine), 34.194),
        (),
        "no kernel waits for the host, though NeMo 25.11 is 3.3 times as fast on these chips",
    )


def _megatron_one_chunk(v3: Config, ranks: int) -> Config:
    """Layout of NeMo 25.04's rows: one chunk a rank, each rank 64 GPUs, TP 2, EP 64."""
    layers = 64 // ranks
    config = _megatron(v3, recipe="bfloat16", sequences=8 * 64 * ranks)
    stages = (layers - 1, *(ranks - 2) * (layers,), layers - 2)
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, pipe=ranks, replica=1),
        layout=dataclasses.replace(config.layout, dispatch="flat", stage_layers=stages),
        batch=dataclasses.replace(config.batch, micro_sequences=32),
    )


def _one_chunk(config: Config, machine: Machine) -> float:
    """Seconds of a step in which a copy of a token is sent for each of its experts."""
    times = _times(config, machine, TENSOR)
    shape = dataclasses.replace(times.shape, each_expert=True)
    return step_time.step_time(dataclasses.replace(times, shape=shape)).total


def megatron_moonlight(moonlight: Config) -> PublishedStep:
    """Moonlight on two nodes, routed by a real router, experts inside a node."""
    mesh = dataclasses.replace(moonlight.mesh, pipe=1, replica=2, node=1, gpu=8, tensor=1)
    config = dataclasses.replace(
        moonlight,
        mesh=mesh,
        layout=dataclasses.replace(
            trace_config(moonlight).layout, recompute="none", zero=1, micro_batches_in_flight=2
        ),
        batch=dataclasses.replace(moonlight.batch, length=4096, sequences=1024, micro_sequences=32),
        precision=dataclasses.replace(moonlight.precision, recipe="bfloat16", dispatch="compute"),
    )
    machine = Machine(chips.H100, network.H100, communication_sms=32)
    times = _times(config, machine)
    return PublishedStep(
        "Megatron-Bridge, Moonlight 16B, 16 H100, BF16",
        "NVIDIA-NeMo/Megatron-Bridge, docs/model-verification/models/moonlight-16b-a3b.md",
        Compared("step, s", step_time.step_time(times).total, 11.636),
        (),
        "grouped matmuls as fast as this project's; a balanced router, where the run's was its own",
    )


DGX_CLOUD = "NVIDIA/dgxc-benchmarking, deepseek_v3/pretraining/README.md, launch.sh (1f6d9f4)"
RANKS, VIRTUAL, TENSOR = 8, 4, 2


def _megatron(v3: Config, *, recipe: str, sequences: int) -> Config:
    """Layout of both rows: TP 2, PP 8, VP 4, EP 64; 64 data-parallel groups of one sequence."""
    return dataclasses.replace(
        v3,
        mesh=dataclasses.replace(v3.mesh, pipe=RANKS, replica=2, node=8, gpu=8, tensor=1),
        layout=dataclasses.replace(trace_config(v3).layout, pipeline="1f1b"),
        batch=dataclasses.replace(v3.batch, sequences=sequences, micro_sequences=64),
        precision=dataclasses.replace(v3.precision, recipe=recipe, dispatch="compute"),
    )


def _times(config: Config, machine: Machine, sequence_ranks: int = 1) -> ChunkTimes:
    found = step_time.times(config, machine)
    share = dataclasses.replace(
        found.shape, sequence_ranks=sequence_ranks, shared_widths=False, keeps_all=True
    )
    return dataclasses.replace(found, shape=share)


def interleaved(times: ChunkTimes, *, overlap: bool) -> float:
    """Seconds of a step of interleaved 1F1B, stages "Et|(tt|)*30mL" over eight ranks.

    The rank with the most work decides; it idles for (ranks - 1) chunks of its own (Narayanan et
    al., 2021). With overlap, forwards before the last rank's first pair, and as many backwards
    after its last one, have nothing beside them (`unpaired`).
    """
    dense = times.config.model.dense_layers
    first = times.chunk((dense, 7 - dense), ("embedding",))
    middle, last = times.chunk((0, 8)), times.chunk((0, 6), ("heads",))
    work = max(_both(chunk, overlap) for chunk in (first, middle, last))
    many = step_time.micro_batches(times.config)
    alone = _both(middle, False)
    bubble = (RANKS - 1) / VIRTUAL * alone
    if overlap:
        bubble += unpaired(RANKS, VIRTUAL) / VIRTUAL * (alone - _both(middle, True))
    return many * work + bubble + update_seconds(times.config, times.machine)


def unpaired(ranks: int, chunks: int) -> int:
    """Forwards of chunks on the last rank before the first that overlaps with a backward."""
    return (chunks - 1) * ranks + 1


def _both(chunk: Chunk, overlap: bool) -> float:
    """Seconds of a micro-batch's forward and backward on one rank."""
    if overlap:
        return forward_and_backward(chunk, chunk).total
    phases: Sequence[Any] = (FORWARD, INPUTS, WEIGHTS)
    return sum(chunk.alone(phase) for phase in phases)
