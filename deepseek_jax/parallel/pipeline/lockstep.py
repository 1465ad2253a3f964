"""DualPipe in lockstep: tables of the work of each rank in each tick, for one program to follow.

Rank r holds two stages, h and S-1-h, where h counts from the nearer end; call them phases 0 and 1.
In tick t it may run a forward chunk of phase (t + h) mod 2 and a backward chunk of the other. With
chunks numbered as chunk = phase xor (h mod 2), all ranks run the same chunks in a tick:

    even tick   forward of chunk 0, backward of chunk 1, ranks (0,1)(2,3).. exchange results
    odd tick    forward of chunk 1, backward of chunk 0, ranks (1,2)(3,4).. exchange results

The forward and the backward result of a tick go to the same neighbour. In the middle of the
pipeline they go to the mirror rank (DualPipe) or stay on the rank (DualPipeV).
"""

import collections
import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from deepseek_jax.parallel.pipeline.schedule import Schedule, Task, Work

IDLE = -1
COLUMNS = (
    "f_micro", "f_in", "f_kept", "b_micro", "b_in", "b_kept", "y_to", "d_x_to", "w_to", "w_from",
    "w_micro", "w_chunk",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TickTables:
    """Work of every rank in every tick, and the pool slots that it reads and writes.

    Attributes:
      tables: name -> [T, ranks] int32, T even. f_micro, b_micro: micro-batch of the tick's forward
        and backward, or IDLE. f_in, b_in: slots of their inputs. f_kept, b_kept: slots where
        forward writes residuals and where backward reads them. y_to, d_x_to: slots for the arriving
        outputs and gradients. w_to: slot where backward writes the inputs of the deferred weight
        gradients; w_from: slot from which those of chunk w_chunk, micro-batch w_micro, are made.
        All w_ columns are IDLE where nothing is deferred.
      slots: pool -> number of slots: "x" (forward inputs), "d_y" (backward inputs), "kept"
        (residuals), and "later" where weight gradients are deferred. None grows with the number of
        micro-batches.
      steady: [first, end) of the ticks in which every rank runs a forward and a backward.
    """

    tables: dict[str, np.ndarray]
    slots: dict[str, int]
    steady: tuple[int, int]

    @property
    def count(self) -> int:
        """Number of ticks."""
        return len(self.tables["f_micro"])


@dataclasses.dataclass(frozen=True)
class BidirectionalStages:
    """The two stages of every rank in DualPipe and DualPipeV, and its partners for exchanges."""

    ranks: int
    stages: int
    chunks: ClassVar[int] = 2  # stages per rank

    @property
    def mirrored(self) -> bool:
        """Whether micro-batches enter at both ends, with every stage on two ranks (DualPipe)."""
        return self.ranks == self.stages

    def depth(self, rank: int) -> int:
        """h, the number of ranks between this one and the nearer end."""
        return min(rank, self.stages - 1 - rank)

    def phase_stage(self, rank: int, phase: int) -> int:
        """Stage of a rank in phase 0 (entered at the nearer end) or 1 (at the other end)."""
        near = self.depth(rank)
        return near if phase == 0 else self.stages - 1 - near

    def stage(self, rank: int, chunk: int) -> int:
        """Stage that a rank holds as its chunk `chunk`."""
        return self.phase_stage(rank, chunk ^ (self.depth(rank) & 1))

    def mirror(self, rank: int) -> int:
        """Rank that holds the same stages for the other direction; the rank itself in DualPipeV."""
        return self.ranks - 1 - rank if self.mirrored else rank

    def neighbour(self, rank: int, phase: int, step: int) -> int:
        """Rank that receives the result of a chunk of this phase: step 1 forward, -1 backward."""
        inward = step if phase == 0 else -step
        depth = self.depth(rank) + inward
        if depth == self.stages // 2:
            return self.mirror(rank)
        return rank + inward if rank < self.stages // 2 else rank - inward

    def swaps(self, parity: int) -> list[tuple[int, int]]:
        """(source, target) ranks of the results of a tick of this parity, in both directions."""
        apex, pairs = self.stages // 2 - 1, []
        for rank in range(self.ranks):
            phase = (parity + self.depth(rank)) & 1
            if phase == 0:
                pairs.append((rank, self.neighbour(rank, 0, 1)))
            elif 0 < self.depth(rank) <= apex:
                pairs.append((rank, self.neighbour(rank, 1, 1)))
        return pairs


def lockstep(schedule: Schedule, defer: bool = False) -> TickTables:
    """Tick tables of DualPipe or DualPipeV.

    Args:
      defer: whether weight gradients are made where the schedule has their W, for at most one chunk
        per tick, instead of in the tick of their backward.
    """
    assignment = BidirectionalStages(schedule.ranks, schedule.stages)
    rows = list(_rows(schedule, assignment, defer))
    rows += [[{} for _ in range(assignment.ranks)]] * (len(rows) % 2)
    tables = {name: np.full((len(rows), assignment.ranks), IDLE, np.int32) for name in COLUMNS}
    slots = _fill(tables, rows, assignment)
    busy = [all({"F", "B"} <= work.keys() for work in row) for row in rows]
    first = next((t for t in range(0, len(rows), 2) if busy[t] and busy[t + 1]), len(rows))
    end = first
    while end < len(rows) and busy[end] and busy[end + 1]:
        end += 2
    return TickTables(tables, slots, (first, end))


# One tick: for each rank its forward "F", backward "B", and deferred weight gradient "W", if any.
Row = list[dict[str, Task]]


def _rows(schedule: Schedule, assignment: BidirectionalStages, defer: bool) -> Iterator[Row]:
    """Ticks in order: every rank's program in its order, each task in its first possible tick."""
    programs = [
        collections.deque(
            t for step in program for t in step if defer or t.work is not Work.WEIGHT_GRAD
        )
        for program in schedule.programs
    ]
    made: dict[tuple[str, int, int], int] = {}  # (F or B, stage, micro-batch) -> tick
    last = schedule.stages - 1
    waiting: list[collections.deque[Task]] = [collections.deque() for _ in programs]
    tick = 0
    while any(programs) or any(waiting):
        row: Row = [{} for _ in programs]
        for rank, program in enumerate(programs):
            forward_stage = assignment.phase_stage(rank, (tick + assignment.depth(rank)) & 1)
            while program:
                task = program[0]
                if task.work is Work.WEIGHT_GRAD:
                    waiting[rank].append(program.popleft())
                    continue
                kind = "F" if task.work is Work.FORWARD else "B"
                if kind == "F":
                    needs = ("F", task.stage - 1, task.micro) if task.stage else None
                else:
                    above = ("B", task.stage + 1, task.micro)
                    needs = above if task.stage < last else ("F", last, task.micro)
                right = (task.stage == forward_stage) == (kind == "F")
                ready = needs is None or made.get(needs, tick) < tick
                if kind in row[rank] or not right or not ready:
                    break
                row[rank][kind] = program.popleft()
                made[kind, task.stage, task.micro] = tick
                if defer and task.work is Work.BACKWARD:
                    waiting[rank].append(task)
            if waiting[rank]:
                row[rank]["W"] = waiting[rank].popleft()
        yield row
        tick += 1
        if tick > 8 * (schedule.stages + schedule.micro_batches):
            raise AssertionError(f"{schedule.kind} does not fit lockstep ticks")


class _Slots:
    """Free slots of a pool on one rank; a slot freed by a tick can be written in the same tick."""

    def __init__(self) -> None:
        self.free: list[int] = []
        self.made = 0

    def take(self) -> int:
        if self.free:
            return self.free.pop()
        self.made += 1
        return self.made - 1


# The columns that every tick writes, and the pool of each.
FILLED = (("f_kept", "kept"), ("y_to", "x"), ("d_x_to", "d_y"), ("w_to", "later"))


def _fill(
    tables: dict[str, np.ndarray], rows: list[Row], assignment: BidirectionalStages
) -> dict[str, int]:
    """Gives values slots from the tick that makes them to the tick that reads them; pool sizes."""
    defer = any("W" in work for row in rows for work in row)
    names = ("x", "d_y", "kept", *(["later"] if defer else []))
    pools = {name: [_Slots() for _ in range(assignment.ranks)] for name in names}
    where: dict[tuple[str, int, int, int], int] = {}
    idle: list[tuple[str, str, int, int, int]] = []
    columns = FILLED if defer else FILLED[:-1]
    last = assignment.stages - 1

    def read(column: str, pool: str, tick: int, rank: int, task: Task) -> None:
        slot = where.pop((pool, rank, task.stage, task.micro))
        tables[column][tick, rank] = slot
        freed.append((pools[pool][rank], slot))

    def write(column: str, pool: str, tick: int, rank: int, stage: int, micro: int) -> None:
        slot = pools[pool][rank].take()
        assert tables[column][tick, rank] == IDLE
        tables[column][tick, rank] = where[pool, rank, stage, micro] = slot

    freed: list[tuple[_Slots, int]] = []

    def free() -> None:
        for pool, slot in freed:
            pool.free.append(slot)
        freed.clear()

    for tick, row in enumerate(rows):
        for rank, work in enumerate(row):
            if forward := work.get("F"):
                tables["f_micro"][tick, rank] = forward.micro
                if forward.stage:
                    read("f_in", "x", tick, rank, forward)
            if backward := work.get("B"):
                tables["b_micro"][tick, rank] = backward.micro
                read("b_in", "d_y", tick, rank, backward)
                read("b_kept", "kept", tick, rank, backward)
        free()
        for rank, work in enumerate(row):
            phase = (tick + assignment.depth(rank)) & 1
            if forward := work.get("F"):
                stage, micro = forward.stage, forward.micro
                write("f_kept", "kept", tick, rank, stage, micro)
                if stage == last:  # the gradient from the head
                    write("d_x_to", "d_y", tick, rank, stage, micro)
                else:
                    write("y_to", "x", tick, assignment.neighbour(rank, phase, 1), stage + 1, micro)
            if (backward := work.get("B")) and backward.stage:
                to = assignment.neighbour(rank, 1 - phase, -1)
                write("d_x_to", "d_y", tick, to, backward.stage - 1, backward.micro)
            if backward and defer:
                write("w_to", "later", tick, rank, backward.stage, backward.micro)
            if weight := work.get("W"):  # read after this tick's write
                read("w_from", "later", tick, rank, weight)
                tables["w_micro"][tick, rank] = weight.micro
                tables["w_chunk"][tick, rank] = weight.stage != assignment.stage(rank, 0)
        for column, name in columns:
            for rank, pool in enumerate(pools[name]):
                if tables[column][tick, rank] == IDLE:  # a write that is never read: a free slot
                    slot = pool.free[-1] if pool.free else pool.made
                    idle.append((column, name, tick, rank, slot))
        free()
    assert not where, "a value is never read"
    return _fill_idle(tables, pools, idle)


def _fill_idle(
    tables: dict[str, np.ndarray],
    pools: dict[str, list[_Slots]],
    idle: list[tuple[str, str, int, int, int]],
) -> dict[str, int]:
    """Gives idle chunks slots to write and read; returns the number of slots of each pool."""
    slots = {name: max(pool.made for pool in ranks) for name, ranks in pools.items()}
    for column, name, tick, rank, slot in idle:
        tables[column][tick, rank] = slot
        slots[name] = max(slots[name], slot + 1)
    for column in ("f_in", "b_in", "b_kept"):  # idle chunks read slot 0, unused
        tables[column][tables[column] == IDLE] = 0
    return slots


def makespan(
    ticks: TickTables,
    forward: float,
    backward: float,
    pair: float | None = None,
    weight: float = 0.0,
) -> float:
    """Time of all ticks, estimated: after each tick a rank waits for its neighbour, not for all.

    Args:
      forward, backward: time of a forward chunk, and of a backward chunk with both gradients.
      pair: time of an overlapped forward and backward; their sum if None.
      weight: the part of `backward` that is deferred until after the exchange.
    """
    both = forward + backward if pair is None else pair
    made_f, made_b, made_w = (
        ticks.tables[name] != IDLE for name in ("f_micro", "b_micro", "w_from")
    )
    before = np.where(made_f & made_b, both, forward * made_f + backward * made_b)
    before = before - weight * made_b
    ranks = before.shape[1]
    end = np.zeros(ranks)
    for tick, (each, after) in enumerate(zip(before, weight * made_w, strict=True)):
        end = end + each
        first = tick % 2
        for rank in range(first, ranks - 1, 2):
            end[rank : rank + 2] = end[rank : rank + 2].max()
        end = end + after
    return float(end.max())
