"""Timelines of schedules: bubbles and live activations against the published formulas."""

import random

import pytest

from deepseek_jax.parallel.pipeline.schedule import (
    BY_NAME,
    Schedule,
    Task,
    Work,
    dualpipe,
    dualpipe_v,
    one_f_one_b,
    zb1p,
)
from deepseek_jax.parallel.pipeline.timeline import Costs, bubble_formula, peak_formula, simulate

EVEN = range(2, 17, 2)


def comparable(stages):
    """Every kind with that many stages, few and many micro-batches."""
    for each in (stages, stages + 3):
        yield one_f_one_b(stages, each)
        yield zb1p(stages, each)
        yield dualpipe(stages, 2 * each)
        yield dualpipe_v(stages // 2, each)


@pytest.mark.parametrize("stages", EVEN)
def test_bubbles_are_the_published_ones(stages):
    for schedule in comparable(stages):
        timeline = simulate(schedule)
        wanted = bubble_formula(schedule.kind, stages)
        assert set(timeline.bubbles) == {wanted}, schedule.kind  # of every rank
        held = 2 if schedule.kind == "dualpipev" else 1
        assert timeline.makespan == 3 * held * schedule.micro_batches + wanted


def test_the_published_numbers():
    """Table 2 of the report at F = I = W = 1: 1F1B 3(PP-1), ZB1P PP-1, DualPipe PP-2."""
    for stages in EVEN:
        found = [bubble_formula(kind, stages) for kind in BY_NAME]
        assert found == [3 * (stages - 1), stages - 1, stages - 2, stages - 2]
    with pytest.raises(KeyError):
        bubble_formula("gpipe", 8)


@pytest.mark.parametrize("stages", EVEN)
def test_live_activations_are_the_published_ones(stages):
    for schedule in comparable(stages):
        peaks = simulate(schedule).peaks
        assert max(peaks) == peak_formula(schedule.kind, stages), schedule.kind
        if schedule.kind.startswith("dual"):
            assert set(peaks) == {stages + 1}  # of every rank
        elif schedule.kind == "zb1p":
            assert set(peaks) == {stages}
        else:
            assert peaks == tuple(range(stages, 0, -1))


# F, I, W, F&B, and the most and the least that a rank of 8 idles, from event simulations made
# before this one.
MEASURED = [
    ((1, 1.5, 1, 3), 5.5, 6.5, 7.5),
    ((1, 1, 1, 2.5), 3.5, 4.5, 4.5),
    ((2, 3, 1, 6), 19, 19, 21),
]


@pytest.mark.parametrize(("costs", "least", "most", "published"), MEASURED)
def test_bubbles_at_other_costs(costs, least, most, published):
    bubbles = simulate(dualpipe(8, 20), Costs(*costs)).bubbles
    assert bubble_formula("dualpipe", 8, Costs(*costs)) == published
    assert (min(bubbles), max(bubbles)) == (least, most)


def likely_costs(number):
    """W <= F <= I and B <= F&B <= F + B: weights are the smaller half, and overlap helps."""
    draw = random.Random(0)
    for _ in range(number):
        forward = draw.randint(1, 8)
        inputs, weights = draw.randint(forward, 12), draw.randint(0, forward)
        backward = inputs + weights
        yield Costs(forward, inputs, weights, draw.randint(backward, forward + backward))


def test_bubbles_never_exceed_the_formula_at_likely_costs():
    for costs in likely_costs(20):
        for stages in (2, 4, 8):
            for schedule in comparable(stages):
                bubble = max(simulate(schedule, costs).bubbles)
                wanted = bubble_formula(schedule.kind, stages, costs)
                exact = schedule.ranks == schedule.stages and schedule.kind != "dualpipe"
                if exact or costs.forward == costs.input_grad:
                    assert bubble == wanted, (schedule.kind, costs)
                assert bubble <= wanted, (schedule.kind, costs)


def test_costs_outside_of_that_exceed_the_formula():
    """Costs outside the conditions of the bound, W <= F <= I, exceed it."""
    for costs in (Costs(3, 2, 2, 6), Costs(1, 1, 1.5), Costs(1, 2, 1, 2.5)):
        assert max(simulate(dualpipe(8, 20), costs).bubbles) > bubble_formula("dualpipe", 8, costs)
    assert max(simulate(zb1p(8, 4)).bubbles) > bubble_formula("zb1p", 8)  # fewer than PP


def test_dualpipe_v_is_half_of_dualpipe():
    for costs in [Costs(), *likely_costs(5)]:
        half, whole = simulate(dualpipe_v(4, 11), costs), simulate(dualpipe(8, 22), costs)
        assert half.starts == whole.starts[:4] == whole.starts[:3:-1]
        assert (half.makespan, half.bubbles) == (whole.makespan, whole.bubbles[:4])


def test_times_of_a_step():
    """By hand: rank 1 starts when rank 0 is done, and rank 0's backward waits for it."""
    timeline = simulate(one_f_one_b(2, 1), Costs(2, 3, 4))
    assert timeline.starts == ((0, 11), (2, 4)) and timeline.ends == ((2, 18), (4, 11))
    assert timeline.makespan == 18 and timeline.bubbles == (9, 9) and timeline.peaks == (1, 1)


def test_costs():
    assert (Costs(1, 2, 4).backward, Costs(1, 2, 4).overlapped, Costs(pair=2).overlapped) == (
        6,
        7,
        2,
    )
    task = {work: Task(work, 0, 0) for work in Work}
    costs = Costs(1, 2, 4, 5)
    assert [costs.of((task[work],)) for work in Work] == [1, 2, 4, 6]
    assert costs.of((task[Work.FORWARD], task[Work.BACKWARD])) == 5


def test_programs_that_halt():
    forward, backward = (Task(work, 0, 0) for work in (Work.FORWARD, Work.BACKWARD))
    with pytest.raises(
        ValueError, match="B of stage 0, micro-batch 0 on rank 0 waits for the outp"
    ):
        simulate(Schedule("1f1b", 1, 1, 1, (((backward,), (forward,)),)))
