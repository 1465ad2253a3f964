"""Seconds of a pipeline chunk, forward F, input gradient I, weight gradient W, and of a pair F&B.

A chunk is the layers of one stage for one micro-batch, with the embedding or the heads where the
stage has them. Alone, a chunk waits for its messages. In a pair its messages travel under the
other chunk's work, except for what exceeds it, and for the synchronisation of each message, which
no work can hide: the peers of a message are late by as much as their own work differs, which is
taken to grow with their tokens.

Of F&B, a message can hide under one part of the other chunk only (figure 4 of the report, and the
same order in Megatron's `model_chunk_schedule_plan.py`):

    messages   combine of B    dispatches of F and of B            combine of F
    work       attention F     experts B, their W, and experts F   attention B and W
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from deepseek_jax.config import Config
from deepseek_jax.parallel.pipeline.schedule import Work
from deepseek_jax.plan.layer_work import BF16, DeviceShare, LayerWork, Matmul, PartWork, layer_work
from deepseek_jax.plan.machine import Machine, Seconds
from deepseek_jax.plan.messages import Message, width_messages

FORWARD, INPUTS, WEIGHTS = Work.FORWARD, Work.INPUT_GRAD, Work.WEIGHT_GRAD
PHASES = (FORWARD, INPUTS, WEIGHTS)
# Name of a message -> position of the work that it hides under, see above.
SLOTS = {"combine backward": 0, "dispatch": 1, "dispatch backward": 1, "combine": 2}
TRACE_TOKENS = 4096  # of a device in the trace that `synchronisation_s` is fitted to


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Seconds of a chunk, by phase.

    Attributes:
      attention, feed, ends: Work of attention, feed-forward networks, and embedding and heads.
      messages: Payload seconds of each message, alone on the links.
      busy: The same beside other messages and matmuls.
      slots: The same by position in F&B.
      tensor: Messages between ranks that share a width, which nothing hides.
      waits: Messages that need synchronisation.
      concurrent: Part of W on a second stream in a pair.
    """

    attention: Mapping[Work, Seconds]
    feed: Mapping[Work, Seconds]
    ends: Mapping[Work, Seconds]
    messages: Mapping[Work, float]
    busy: Mapping[Work, float]
    slots: Mapping[Work, tuple[float, ...]]
    tensor: Mapping[Work, float]
    waits: Mapping[Work, float]
    concurrent: float

    def compute(self, phase: Work) -> float:
        """Seconds of computation of a phase."""
        return self.attention[phase].total + self.feed[phase].total + self.ends[phase].total

    def alone(self, phase: Work) -> float:
        """Seconds of a phase that nothing overlaps with."""
        return self.compute(phase) + self.exposed_alone(phase)

    def exposed_alone(self, phase: Work) -> float:
        """Seconds in which a phase that nothing overlaps with waits for messages."""
        return self.messages[phase] + self.tensor[phase] + self.waits[phase]


@dataclasses.dataclass(frozen=True)
class OverlappedPair:
    """Seconds of two chunks that overlap.

    Attributes:
      compute: Computation of both, without what a second stream takes.
      payload: Messages of both.
      exposed: Messages beyond the computation.
      synchronisation: Waits that nothing hides, and sums over tensor-parallel ranks.
    """

    compute: float
    payload: float
    exposed: float
    synchronisation: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.synchronisation


def overlapped(parts: Iterable[tuple[Chunk, Work]]) -> OverlappedPair:
    """Pair of the given phases of chunks."""
    parts = list(parts)
    compute = sum(chunk.compute(phase) for chunk, phase in parts)
    compute -= sum(chunk.concurrent for chunk, phase in parts if phase is WEIGHTS)
    payload = sum(chunk.busy[phase] for chunk, phase in parts)
    waits = sum(chunk.waits[phase] + chunk.tensor[phase] for chunk, phase in parts)
    return OverlappedPair(compute, payload, max(0.0, payload - compute), waits)


def forward_and_backward(forward: Chunk, backward: Chunk) -> OverlappedPair:
    """F&B of DualPipe: messages hide under the work beside them; see the head of this file."""
    pair = overlapped([(forward, FORWARD), (backward, INPUTS), (backward, WEIGHTS)])
    experts = forward.feed[FORWARD].total - backward.concurrent
    work = (
        forward.attention[FORWARD].total,
        experts + backward.feed[INPUTS].total + backward.feed[WEIGHTS].total,
        backward.attention[INPUTS].total + backward.attention[WEIGHTS].total,
    )
    sent = map(sum, zip(forward.slots[FORWARD], backward.slots[INPUTS], strict=True))
    exposed = sum(max(0.0, each - under) for each, under in zip(sent, work, strict=True))
    return dataclasses.replace(pair, exposed=exposed)


@dataclasses.dataclass(frozen=True)
class ChunkTimes:
    """Times of chunks on a machine.

    Attributes:
      shape: A device's share of the model.
      machine: Machine.
    """

    shape: DeviceShare
    machine: Machine

    @property
    def config(self) -> Config:
        return self.shape.config

    def layer(self, *, dense: bool) -> Chunk:
        """Chunk of a single layer."""
        return self.chunk((1, 0) if dense else (0, 1))

    def chunk(self, layers: tuple[int, int], ends: Sequence[str] = ()) -> Chunk:
        """A chunk of (dense, MoE) layers; `ends` names "embedding" and "heads"."""
        works = [layer_work(self.shape, dense=True), layer_work(self.shape, dense=False)]
        mtp = self.config.model.mtp_depth if "heads" in ends else 0
        counts = layers[0], layers[1] + mtp
        return Chunk(
            attention=self._parts(works, counts, "attention"),
            feed=self._parts(works, counts, "feed"),
            ends=self._ends(ends),
            messages=self._messages(works, counts, overlapped=False),
            busy=self._messages(works, counts, overlapped=True),
            slots={p: self._slots(works, counts, p) for p in PHASES},
            tensor={p: self._tensor(works, counts, ends, p) for p in PHASES},
            waits={p: self._waits(works, counts, p) for p in PHASES},
            concurrent=self._concurrent(works, counts),
        )

    def _parts(self, works: list[LayerWork], counts: tuple[int, int], part: str):
        return {phase: self._sum(works, counts, part, phase) for phase in PHASES}

    def _sum(self, works: list[LayerWork], counts, part: str, phase: Work) -> Seconds:
        total = Seconds()
        for work, count in zip(works, counts, strict=True):
            if count:
                total += self._seconds(getattr(work, part)[phase], phase) * count
        return total

    def _seconds(self, piece: PartWork, phase: Work) -> Seconds:
        recipe = self.config.precision.recipe
        return self.machine.seconds(piece, backward=phase is not FORWARD, recipe=recipe)

    def _messages(self, works, counts, *, overlapped: bool) -> dict[Work, float]:
        return {p: self._payload(works, counts, p, "messages", overlapped) for p in PHASES}

    def _payload(self, works, counts, phase: Work, kind: str, overlapped: bool) -> float:
        sent: list[tuple[Message, int]] = [
            (message, count)
            for work, count in zip(works, counts, strict=True)
            for message in getattr(work, kind)[phase]
        ]
        seconds = self.machine.message_seconds
        return sum(
            count * seconds(self._placed(message), overlapped=overlapped) for message, count in sent
        )

    def _slots(self, works: list[LayerWork], counts, phase: Work) -> tuple[float, ...]:
        found = [0.0] * 3
        for work, count in zip(works, counts, strict=True):
            for message in work.messages[phase]:
                placed = self._placed(message)
                seconds = self.machine.message_seconds(placed, overlapped=True)
                found[SLOTS[message.name]] += count * seconds
        return tuple(found)

    def _placed(self, message: Message) -> Message:
        """The message on the machine's links; its nodes may differ from the mesh's."""
        whole, mesh = message.slow_bytes + message.fast_bytes, self.config.mesh
        if self.shape.devices_of_experts * mesh.tensor <= self.machine.network.gpus_per_node:
            return Message(message.name, 0.0, whole)
        if mesh.gpu * mesh.tensor > self.machine.network.gpus_per_node:
            return Message(message.name, whole, 0.0)
        return message

    def _tensor(self, works, counts, ends: Sequence[str], phase: Work) -> float:
        seconds = self._payload(works, counts, phase, "tensor", False)
        if "heads" in ends and phase is not WEIGHTS and self.shape.shared_widths:
            heads = 1 + self.config.model.mtp_depth
            sent = width_messages(self.config, self.shape.tokens, "vocab", heads)
            placed = (self._placed(message) for message in sent)
            seconds += sum(self.machine.message_seconds(m, overlapped=False) for m in placed)
        return seconds

    def _waits(self, works: list[LayerWork], counts, phase: Work) -> float:
        crossing = sum(
            count * sum(self._placed(message).slow_bytes > 0 for message in work.messages[phase])
            for work, count in zip(works, counts, strict=True)
        )
        late = self.shape.tokens / TRACE_TOKENS  # the work that peers are late in
        return crossing * late * self.machine.efficiency.synchronisation_s

    def _concurrent(self, works: list[LayerWork], counts: tuple[int, int]) -> float:
        if self.config.precision.recipe != "fp8":
            return 0.0
        share = self.machine.efficiency.concurrent_weight_gradient
        return share * counts[1] * self._seconds(works[1].feed[WEIGHTS], WEIGHTS).matmul

    def _ends(self, ends: Sequence[str]) -> dict[Work, Seconds]:
        model, tokens = self.config.model, self.shape.tokens
        pieces = {phase: PartWork() for phase in PHASES}
        if "embedding" in ends:
            row = PartWork((), 0.0, 0.0, 2 * BF16 * tokens * model.d_model)
            pieces[FORWARD], pieces[WEIGHTS] = pieces[FORWARD] + row, pieces[WEIGHTS] + row
        if "heads" in ends:
            d, vocab = model.d_model, model.vocab / self.config.mesh.tensor
            for phase, piece in _head(tokens, d, vocab).items():
                pieces[phase] += _times(piece, 1 + model.mtp_depth)
            projection = Matmul(tokens, 2 * d, d), Matmul(tokens, d, 2 * d)
            gradient = Matmul(2 * d, tokens, d, gradient=True)
            for phase, matmul in zip(PHASES, (*projection, gradient), strict=True):
                pieces[phase] += _times(PartWork((matmul,)), model.mtp_depth)
        return {phase: self._seconds(piece, phase) for phase, piece in pieces.items()}


def _times(piece: PartWork, count: int) -> PartWork:
    total = PartWork()
    for _ in range(count):
        total += piece
    return total


def _head(tokens: int, d: int, vocab: float) -> dict[Work, PartWork]:
    """Head and cross-entropy: logits in 16-bit products, read and written in float32."""
    logits = 4.0 * tokens * vocab
    forward = Matmul(tokens, d, vocab, linear=False)
    return {
        FORWARD: PartWork((forward,), streamed_bytes=3 * logits),
        INPUTS: PartWork((Matmul(tokens, vocab, d, linear=False),), streamed_bytes=2 * logits),
        WEIGHTS: PartWork((Matmul(d, tokens, vocab, linear=False, gradient=True),)),
    }
