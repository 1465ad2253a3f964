"""Lockstep tables of DualPipe, replayed with names for arrays, as `executor.py` reads them."""

import itertools

import numpy as np
import pytest

from deepseek_jax.parallel.pipeline.lockstep import IDLE, BidirectionalStages, lockstep, makespan
from deepseek_jax.parallel.pipeline.schedule import BY_NAME
from deepseek_jax.parallel.pipeline.timeline import bubble_formula

NOTHING = "made by an idle chunk, or sent by nobody"
SIZES = [("dualpipe", ranks) for ranks in range(2, 17, 2)]
SIZES += [("dualpipev", ranks) for ranks in range(1, 9)]
kinds = pytest.mark.parametrize(("kind", "ranks"), SIZES, ids=str)


def wall_of(kind, ranks):
    return BidirectionalStages(ranks, ranks if kind == "dualpipe" else 2 * ranks)


def counts(kind, ranks):
    """Micro-batches: the fewest, a few more (odd where it may be), and two of many."""
    more = 2 if kind == "dualpipe" else 1
    return 2 * ranks, 2 * ranks + more, 3 * ranks, 8 * ranks


def stage_of(stages, rank, chunk):
    """By the module's docstring: chunk = phase xor (h mod 2)."""
    near = min(rank, stages - 1 - rank)
    return (near, stages - 1 - near)[chunk ^ (near % 2)]


class Pool:
    """Slots that must be read before they are written again."""

    def __init__(self, slots):
        self.held = [NOTHING] * slots

    def read(self, slot, used):
        value = self.held[slot]
        if used:
            self.held[slot] = NOTHING
        return value if used else NOTHING

    def write(self, slot, value):
        assert 0 <= slot < len(self.held)
        assert self.held[slot] is NOTHING, f"{value} overwrites {self.held[slot]}"
        self.held[slot] = value


def sent(values, swaps):
    """`ppermute`: a rank without a sender receives nothing."""
    if not swaps:
        return values
    out = [NOTHING] * len(values)
    for source, target in swaps:
        out[target] = values[source]
    return out


def replay(ticks, wall):
    """Every (work, rank, stage, micro-batch) in order of time."""
    ranks, stages, done = range(wall.ranks), wall.stages, []
    pools = {name: [Pool(count) for _ in ranks] for name, count in ticks.slots.items()}
    for tick in range(ticks.count):
        now = {name: table[tick] for name, table in ticks.tables.items()}
        parity = tick % 2
        y, d_x, kept = ([NOTHING] * wall.ranks for _ in range(3))
        head = {}
        for rank in ranks:
            stage, micro = stage_of(stages, rank, parity), int(now["f_micro"][rank])
            on = micro != IDLE
            x = pools["x"][rank].read(now["f_in"][rank], on and stage > 0)
            if on:
                assert x == (NOTHING if stage == 0 else ("y", stage - 1, micro))
                assert stage > 0 or parity == 0, "the embedding is looked up in even ticks only"
                y[rank], kept[rank] = ("y", stage, micro), ("kept", stage, micro)
                done.append(("F", rank, stage, micro))
                if stage == stages - 1:
                    assert parity == 1, "the loss is made in odd ticks only"
                    head[rank] = ("d_x", stages, micro)
            stage, micro = stage_of(stages, rank, 1 - parity), int(now["b_micro"][rank])
            on = micro != IDLE
            d_y = pools["d_y"][rank].read(now["b_in"][rank], on)
            saved = pools["kept"][rank].read(now["b_kept"][rank], on)
            if on:
                assert (d_y, saved) == (("d_x", stage + 1, micro), ("kept", stage, micro))
                assert stage > 0 or parity == 1, "the table gets gradients in odd ticks only"
                d_x[rank] = ("d_x", stage, micro) if stage else NOTHING
                done.append(("B", rank, stage, micro))
        y = [NOTHING if value[:2] == ("y", stages - 1) else value for value in y]  # the head has it
        swaps = wall.swaps(parity)
        y_here, d_x_here = sent(y, swaps), sent(d_x, swaps)
        for rank in ranks:
            pools["x"][rank].write(now["y_to"][rank], y_here[rank])
            if rank in head:
                assert d_x_here[rank] is NOTHING, "the head's gradient takes another's place"
            pools["d_y"][rank].write(now["d_x_to"][rank], head.get(rank, d_x_here[rank]))
            pools["kept"][rank].write(now["f_kept"][rank], kept[rank])
    left = [v for pool in pools.values() for each in pool for v in each.held if v is not NOTHING]
    assert not left, "values that nobody read"
    return done


@kinds
def test_every_chunk_runs_once_on_what_its_neighbour_made(kind, ranks):
    wall = wall_of(kind, ranks)
    for count in counts(kind, ranks):
        want = set()
        for stage, micro in itertools.product(range(wall.stages), range(count)):
            if kind == "dualpipe":  # the second half enters at the other end
                owner = stage if micro < count // 2 else ranks - 1 - stage
            else:
                owner = min(stage, 2 * ranks - 1 - stage)
            want |= {(work, owner, stage, micro) for work in "FB"}
        done = replay(lockstep(BY_NAME[kind](ranks, count)), wall)
        assert len(done) == len(want) and set(done) == want


@pytest.mark.parametrize(
    ("column", "pool", "of"),
    [("f_in", "x", "f_micro"), ("f_kept", "kept", "f_micro"), ("b_kept", "kept", "b_micro")],
)
def test_the_replay_sees_a_wrong_slot(column, pool, of):
    wall, rank = BidirectionalStages(4, 4), 1
    for tick in np.flatnonzero(lockstep(BY_NAME["dualpipe"](4, 8)).tables[of][:, rank] != IDLE):
        ticks = lockstep(BY_NAME["dualpipe"](4, 8))
        ticks.tables[column][tick, rank] += 1
        ticks.tables[column][tick, rank] %= ticks.slots[pool]
        with pytest.raises(AssertionError):
            replay(ticks, wall)


def test_the_replay_sees_an_idle_write_over_a_live_value():
    ticks = lockstep(BY_NAME["dualpipe"](4, 8))
    table, rank = ticks.tables, 1
    idle = table["f_micro"][:-1, rank] == IDLE
    tick = np.flatnonzero(idle & (table["b_micro"][1:, rank] != IDLE))[-1]
    table["f_kept"][tick, rank] = table["b_kept"][tick + 1, rank]
    with pytest.raises(AssertionError, match="overwrites"):
        replay(ticks, BidirectionalStages(4, 4))


@kinds
def test_slots_do_not_grow_with_the_micro_batches(kind, ranks):
    stages = wall_of(kind, ranks).stages
    found = [lockstep(BY_NAME[kind](ranks, count)).slots for count in counts(kind, ranks)]
    assert all(slots == found[0] for slots in found)
    # The published PP + 1 live chunks, and one for what idle chunks write; two stages need neither.
    kept = stages + 2 if stages > 2 else 2
    assert found[0] == {"kept": kept, "x": min(stages // 2, 3), "d_y": 1}


@kinds
def test_ticks_and_the_steady_window(kind, ranks):
    wall = wall_of(kind, ranks)
    for count in counts(kind, ranks):
        ticks = lockstep(BY_NAME[kind](ranks, count))
        each = count * wall.stages // ranks  # forward chunks of a rank
        ramp = 3 * wall.stages - 4
        assert ticks.count == each + ramp and ticks.count % 2 == 0
        assert ticks.steady == (ramp, each + wall.stages - 2)
        on = [ticks.tables[name] != IDLE for name in ("f_micro", "b_micro")]
        busy = (on[0] & on[1]).all(axis=1)
        first, end = ticks.steady
        assert busy[first:end].all() and not (busy[:first:2] & busy[1:first:2]).any()
        assert first % 2 == end % 2 == 0
        for table in ticks.tables.values():
            assert table.shape == (ticks.count, ranks) and table.dtype == np.int32


@kinds
def test_makespan(kind, ranks):
    """F = I = W = 1, as the published formula has it: this is what the wall's joints cost.

    A rank hands on what it made at the end of a tick, weight gradients with it: 7 units of bubble
    for each pair of stages where asynchronous ranks have 2.
    """
    stages = wall_of(kind, ranks).stages
    pairs = stages // 2 - 1
    for count in counts(kind, ranks):
        ticks = lockstep(BY_NAME[kind](ranks, count))
        work = 3 * count * stages // ranks
        bubble = makespan(ticks, forward=1, backward=2) - work
        assert bubble == max(7 * pairs - 1, 0)
        assert bubble_formula(kind, stages) == 2 * pairs <= bubble
        # Chunks that hide each other's messages shorten only the busy ticks.
        hidden = makespan(ticks, forward=1, backward=2, pair=2.5)
        steady = ticks.steady[1] - ticks.steady[0]
        assert makespan(ticks, 1, 2) - hidden >= steady / 2


@pytest.mark.parametrize(("ranks", "count", "bubble"), [(8, 20, 20), (16, 40, 48), (16, 120, 48)])
def test_bubbles_of_known_sizes(ranks, count, bubble):
    for kind, half in (("dualpipe", 1), ("dualpipev", 2)):
        ticks = lockstep(BY_NAME[kind](ranks // half, count // half))
        assert makespan(ticks, forward=1, backward=2) == 3 * count + bubble


@pytest.mark.parametrize(("ranks", "count", "bubble"), [(8, 20, 11), (16, 40, 27), (16, 120, 27)])
def test_deferred_gradients_shorten_the_bubble(ranks, count, bubble):
    for kind, half in (("dualpipe", 1), ("dualpipev", 2)):
        made = BY_NAME[kind](ranks // half, count // half)
        ticks = lockstep(made, defer=True)
        assert makespan(ticks, forward=1, backward=2, weight=1) == 3 * count + bubble
        assert ticks.count == lockstep(made).count and ticks.slots["later"] == ranks // 2


@kinds
def test_every_deferred_gradient_is_made_once(kind, ranks):
    """Each deferred gradient comes after its backward, from a slot that is still valid."""
    for count in counts(kind, ranks):
        ticks = lockstep(BY_NAME[kind](ranks, count), defer=True)
        table = ticks.tables
        for rank in range(ranks):
            pool, made = Pool(ticks.slots["later"]), []
            for tick in range(ticks.count):
                to, taken = table["w_to"][tick, rank], table["w_from"][tick, rank]
                if (micro := table["b_micro"][tick, rank]) != IDLE:
                    pool.write(to, (micro, 1 - tick % 2))
                else:
                    assert pool.held[to] is NOTHING
                assert (taken == IDLE) == (table["w_chunk"][tick, rank] == IDLE)
                if taken != IDLE:
                    micro, chunk = pool.read(taken, True)
                    assert chunk == table["w_chunk"][tick, rank]
                    assert micro == table["w_micro"][tick, rank]
                    made.append((micro, chunk))
            assert len(made) == len(set(made)) == (table["b_micro"][:, rank] != IDLE).sum()
            assert all(value is NOTHING for value in pool.held)


@kinds
def test_swaps(kind, ranks):
    wall = wall_of(kind, ranks)
    for parity in (0, 1):
        pairs = wall.swaps(parity)
        sources, targets = zip(*pairs, strict=True) if pairs else ((), ())
        assert len(set(sources)) == len(sources) and sorted(sources) == sorted(targets)
        assert {(b, a) for a, b in pairs} == set(pairs), "what goes out comes in the same way"
        joints = {frozenset((r, r + 1)) for r in range(parity, ranks - 1, 2)}
        assert {frozenset(pair) for pair in pairs if pair[0] != pair[1]} == joints
        apex = {a for a, b in pairs if a == b}
        assert apex == ({ranks - 1} if kind == "dualpipev" and (ranks - 1) % 2 == parity else set())


@kinds
def test_neighbours_hold_neighbouring_stages(kind, ranks):
    wall = wall_of(kind, ranks)
    for rank in range(ranks):
        stages = {wall.stage(rank, chunk) for chunk in (0, 1)}
        assert stages == {stage_of(wall.stages, rank, chunk) for chunk in (0, 1)}
        mirror = wall.mirror(rank)
        assert wall.mirror(mirror) == rank
        assert {wall.stage(mirror, chunk) for chunk in (0, 1)} == stages
        for phase, step in itertools.product((0, 1), (1, -1)):
            stage = wall.phase_stage(rank, phase) + step
            if not 0 <= stage < wall.stages:
                continue
            other = wall.neighbour(rank, phase, step)
            there = [p for p in (0, 1) if wall.phase_stage(other, p) == stage]
            assert len(there) == 1
            assert wall.neighbour(other, there[0], -step) == rank
