"""DualPipe in lockstep: when each rank does what, as tables that one program can follow.

Rank r holds two stages, h and S-1-h, where h counts from the nearer end; call them phases 0 and 1.
In tick t it may run a forward chunk of phase (t + h) mod 2 and a backward chunk of the other. Name
the phases of odd h the other way round, chunk = phase xor (h mod 2), and every rank does the same:

    even tick   forward of chunk 0, backward of chunk 1, swap with the neighbour across (0,1)(2,3)..
    odd tick    forward of chunk 1, backward of chunk 0, swap across (1,2)(3,4)..

like the joints of a brick wall. What a tick made forward and what it made backward go to the same
neighbour, or at the apex to the mirror rank (DualPipe) or nowhere (DualPipeV).
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
    """Attributes:
    tables: name -> [T, ranks] int32, T even. f_micro, b_micro: the micro-batch of a tick's forward
      and backward, or IDLE. f_in, b_in: the slots that their inputs wait in. f_kept, b_kept: the
      slots for what forward keeps for backward. y_to, d_x_to: the slots for what arrives. w_to,
      w_from: where backward leaves what the weights' gradients are made of, and what is taken to
      make those of w_chunk for w_micro, or IDLE; all four are IDLE where nothing is deferred.
    slots: of the pools "x" (inputs of forward), "d_y" (of backward), "kept", and "later" where
      gradients are deferred. None grows with the number of micro-batches.
    steady: [first, end) ticks in which every rank does both.
    """

    tables: dict[str, np.ndarray]
    slots: dict[str, int]
    steady: tuple[int, int]

    @property
    def count(self) -> int:
        return len(self.tables["f_micro"])


@dataclasses.dataclass(frozen=True)
class BidirectionalStages:
    """Who holds which stage, and who swaps with whom."""

    ranks: int
    stages: int
    chunks: ClassVar[int] = 2  # of a rank

    @property
    def mirrored(self) -> bool:
        """Whether micro-batches enter at both ends, so that every stage is held twice."""
        return self.ranks == self.stages

    def depth(self, rank: int) -> int:
        """h: ranks between this one and its end."""
        return min(rank, self.stages - 1 - rank)

    def phase_stage(self, rank: int, phase: int) -> int:
        near = self.depth(rank)
        return near if phase == 0 else self.stages - 1 - near

    def stage(self, rank: int, chunk: int) -> int:
        return self.phase_stage(rank, chunk ^ (self.depth(rank) & 1))

    def mirror(self, rank: int) -> int:
        """The rank that holds the same stages, for the other direction."""
        return self.ranks - 1 - rank if self.mirrored else rank

    def neighbour(self, rank: int, phase: int, step: int) -> int:
        """Where a chunk of this phase goes: step 1 forward, -1 backward."""
        inward = step if phase == 0 else -step
        depth = self.depth(rank) + inward
        if depth == self.stages // 2:
            return self.mirror(rank)
        return rank + inward if rank < self.stages // 2 else rank - inward

    def swaps(self, parity: int) -> list[tuple[int, int]]:
        """(from, to) of what a tick of this parity made, forward and backward alike."""
        apex, pairs = self.stages // 2 - 1, []
        for rank in range(self.ranks):
            phase = (parity + self.depth(rank)) & 1
            if phase == 0:
                pairs.append((rank, self.neighbour(rank, 0, 1)))
            elif 0 < self.depth(rank) <= apex:
                pairs.append((rank, self.neighbour(rank, 1, 1)))
        return pairs


def lockstep(schedule: Schedule, defer: bool = False) -> TickTables:
    """The tables of DualPipe or DualPipeV.

    Args:
      defer: make a weight's gradients when the schedule says so, at most one chunk's in a tick,
        instead of where their backward is.
    """
    wall = BidirectionalStages(schedule.ranks, schedule.stages)
    rows = list(_rows(schedule, wall, defer))
    rows += [[{} for _ in range(wall.ranks)]] * (len(rows) % 2)
    tables = {name: np.full((len(rows), wall.ranks), IDLE, np.int32) for name in COLUMNS}
    slots = _fill(tables, rows, wall)
    busy = [all({"F", "B"} <= work.keys() for work in row) for row in rows]
    first = next((t for t in range(0, len(rows), 2) if busy[t] and busy[t + 1]), len(rows))
    end = first
    while end < len(rows) and busy[end] and busy[end + 1]:
        end += 2
    return TickTables(tables, slots, (first, end))


# Of each rank: its forward F and backward B of one tick, and whose weights' gradients are made, W.
Row = list[dict[str, Task]]


def _rows(schedule: Schedule, wall: BidirectionalStages, defer: bool) -> Iterator[Row]:
    """Every rank's program in its order, each task in the first tick that it can have."""
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
            forward_stage = wall.phase_stage(rank, (tick + wall.depth(rank)) & 1)
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
            raise AssertionError(f"{schedule.kind} does not fit the brick wall")


class _Slots:
    """A pool's free slots on one rank. A slot that a tick frees can be written in the same tick."""

    def __init__(self) -> None:
        self.free: list[int] = []
        self.made = 0

    def take(self) -> int:
        if self.free:
            return self.free.pop()
        self.made += 1
        return self.made - 1


# What every tick writes, and the pool that it writes to.
FILLED = (("f_kept", "kept"), ("y_to", "x"), ("d_x_to", "d_y"), ("w_to", "later"))


def _fill(
    tables: dict[str, np.ndarray], rows: list[Row], wall: BidirectionalStages
) -> dict[str, int]:
    """Gives every value a slot from the tick that makes it to the tick that reads it."""
    defer = any("W" in work for row in rows for work in row)
    names = ("x", "d_y", "kept", *(["later"] if defer else []))
    pools = {name: [_Slots() for _ in range(wall.ranks)] for name in names}
    where: dict[tuple[str, int, int, int], int] = {}
    idle: list[tuple[str, str, int, int, int]] = []
    last = wall.stages - 1

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
            phase = (tick + wall.depth(rank)) & 1
            if forward := work.get("F"):
                stage, micro = forward.stage, forward.micro
                write("f_kept", "kept", tick, rank, stage, micro)
                if stage == last:  # the head's own gradient
                    write("d_x_to", "d_y", tick, rank, stage, micro)
                else:
                    write("y_to", "x", tick, wall.neighbour(rank, phase, 1), stage + 1, micro)
            if (backward := work.get("B")) and backward.stage:
                to = wall.neighbour(rank, 1 - phase, -1)
                write("d_x_to", "d_y", tick, to, backward.stage - 1, backward.micro)
            if backward and defer:
                write("w_to", "later", tick, rank, backward.stage, backward.micro)
            if weight := work.get("W"):  # the pool's one read that is after the tick's write
                read("w_from", "later", tick, rank, weight)
                tables["w_micro"][tick, rank] = weight.micro
                tables["w_chunk"][tick, rank] = weight.stage != wall.stage(rank, 0)
        for column, name in FILLED if defer else FILLED[:-1]:
            for rank, pool in enumerate(pools[name]):
                if tables[column][tick, rank] == IDLE:  # nobody will read it: to a free slot
                    slot = pool.free[-1] if pool.free else pool.made
                    idle.append((column, name, tick, rank, slot))
        free()
    assert not where, "a value that nobody reads"
    slots = {name: max(pool.made for pool in ranks) for name, ranks in pools.items()}
    for column, name, tick, rank, slot in idle:
        tables[column][tick, rank] = slot
        slots[name] = max(slots[name], slot + 1)
    for column in ("f_in", "b_in", "b_kept"):  # what is read to nobody's use
        tables[column][tables[column] == IDLE] = 0
    return slots


def makespan(
    ticks: TickTables,
    forward: float,
    backward: float,
    pair: float | None = None,
    weight: float = 0.0,
) -> float:
    """Time of all ticks where a rank waits for its neighbour of the tick before, and no longer.

    Args:
      backward: of both gradients.
      pair: of forward beside backward; one after the other if None.
      weight: that part of `backward` which comes after the swap, where it is deferred.
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
