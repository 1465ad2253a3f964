"""Schedules: the published figure, every valid size, and refused schedules."""

import dataclasses
import pathlib
import re

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.pipeline import timeline
from deepseek_jax.parallel.pipeline.schedule import (
    BY_NAME,
    Schedule,
    Task,
    Work,
    dualpipe,
    dualpipe_v,
    one_f_one_b,
    validate,
    zb1p,
)

FIGURE = (pathlib.Path(__file__).parent / "dualpipe_8_20.txt").read_text()

ONE_F_ONE_B = """\
rank 0 |a0a1..........A0==..A1==|
rank 1 |..a0a1....A0==..A1==....|
rank 2 |....a0A0==a1A1==........|
"""
ZB1P = """\
rank 0 |a0a1a2....A0x0a3A1x1A2x2A3x3|
rank 1 |..a0a1..A0a2A1x0a3A2x1A3x2x3|
rank 2 |....a0A0a1A1a2A2x0a3A3x1x2x3|
"""


def test_the_published_figure():
    assert f"{timeline.draw(dualpipe(8, 20))}\n" == FIGURE


def test_dualpipe_v_is_half_of_the_figure():
    assert timeline.draw(dualpipe_v(4, 10)).splitlines() == FIGURE.splitlines()[:4]


def test_other_figures():
    assert f"{timeline.draw(zb1p(3, 4))}\n" == ZB1P
    assert f"{timeline.draw(one_f_one_b(3, 2))}\n" == ONE_F_ONE_B


def test_two_digits_keep_the_columns():
    first, *_, last = timeline.draw(dualpipe(2, 24)).splitlines()
    assert first.startswith("rank 0 |a00b00a01B00===b01&A00==") and len(first) == len(last)
    assert timeline.draw(one_f_one_b(11, 1)).splitlines()[0].startswith("rank  0 |a0..")


def test_the_order_of_rank_0():
    """Order in the figure: fill, meet, zero bubble, main part; and the pairs of every rank."""
    steps = dualpipe(8, 20).programs[0]
    counted = [sum(len(s) > 1 for s in p) for p in dualpipe(8, 20).programs]
    assert counted == [9, 10, 11, 11, 11, 11, 10, 9]
    assert steps[0] == (Task(Work.FORWARD, 0, 0),)
    assert steps[7:9] == ((Task(Work.FORWARD, 7, 10),), (Task(Work.INPUT_GRAD, 7, 10),))
    assert steps[17] == (Task(Work.FORWARD, 0, 7), Task(Work.BACKWARD, 7, 13))
    for work, wanted in ((Work.INPUT_GRAD, 7), (Work.WEIGHT_GRAD, 7), (Work.BACKWARD, 4 + 9)):
        assert sum(task.work is work for step in steps for task in step) == wanted


def sizes():
    for ranks in (*range(1, 9), 15, 16):
        for kind, make in BY_NAME.items():
            least = 2 * ranks if kind.startswith("dual") else 1
            for micro in sorted({least, least + 1, 3 * ranks, 4 * ranks}):
                if kind != "dualpipe" or ranks % 2 == micro % 2 == 0:
                    yield kind, make, ranks, micro


def test_every_legal_size_is_valid():
    for kind, make, ranks, micro in sizes():
        schedule = make(ranks, micro)
        validate(schedule)
        assert schedule.kind == kind and len(schedule.programs) == schedule.ranks == ranks
        assert schedule.stages == ranks * (2 if kind == "dualpipev" else 1)
        assert schedule.micro_batches == micro


def test_mirror_ranks_hold_the_same_stages():
    schedule = dualpipe(8, 20)
    for rank in range(8):
        tasks = [task for step in schedule.programs[rank] for task in step]
        assert {task.stage for task in tasks} == {rank, 7 - rank}
        assert all((task.stage == rank) == (task.micro < 10) for task in tasks)


def edit(schedule: Schedule, rank: int, change) -> Schedule:
    programs = [list(program) for program in schedule.programs]
    programs[rank] = change(programs[rank])
    return dataclasses.replace(schedule, programs=tuple(map(tuple, programs)))


def first(schedule: Schedule, rank: int, *works: Work) -> int:
    """Place of the first step that is one task of such a work."""
    steps = enumerate(schedule.programs[rank])
    return next(n for n, step in steps if len(step) == 1 and step[0].work in works)


def to_front(number: int):
    return lambda program: [program[number], *program[:number], *program[number + 1 :]]


SMALL = [one_f_one_b(4, 6), zb1p(4, 6), dualpipe(4, 12), dualpipe_v(2, 6)]
BY_KIND = pytest.mark.parametrize("schedule", SMALL, ids=lambda schedule: schedule.kind)


@BY_KIND
def test_any_dropped_step_is_missed(schedule):
    for rank, program in enumerate(schedule.programs):
        for number, step in enumerate(program):
            where = "|".join(f"stage {t.stage}, micro-batch {t.micro} has " for t in step)
            with pytest.raises(ValueError, match=where):
                validate(edit(schedule, rank, lambda p, n=number: p[:n] + p[n + 1 :]))


@BY_KIND
def test_any_repeated_step_is_found(schedule):
    for rank, program in enumerate(schedule.programs):
        for number, step in enumerate(program):
            with pytest.raises(ValueError, match=f"{step[0]} is on rank {rank} twice"):
                validate(edit(schedule, rank, lambda p, n=number: [*p, p[n]]))


@BY_KIND
def test_any_step_on_another_rank_is_found(schedule):
    for rank, program in enumerate(schedule.programs):
        other = (rank + 1) % schedule.ranks
        for number, step in enumerate(program):
            moved = edit(schedule, rank, lambda p, n=number: p[:n] + p[n + 1 :])
            moved = edit(moved, other, lambda p, s=step: [*p, s])
            with pytest.raises(ValueError, match=f"{step[0]} is on rank {other}, and its stage is"):
                validate(moved)


@BY_KIND
def test_a_backward_before_its_forward_is_found(schedule):
    rank = schedule.ranks - 1
    number = first(schedule, rank, Work.BACKWARD, Work.INPUT_GRAD)
    task = schedule.programs[rank][number][0]
    wanted = f"{task} on rank {rank} waits for the output of stage {task.stage}, micro-batch "
    with pytest.raises(
        ValueError, match=f"{wanted}{task.micro}, which rank {rank} makes only later"
    ):
        validate(edit(schedule, rank, to_front(number)))


@BY_KIND
def test_a_weight_gradient_before_its_input_gradient_is_found(schedule):
    if schedule.kind == "1f1b":
        return  # has none
    for rank in range(schedule.ranks):
        number = first(schedule, rank, Work.WEIGHT_GRAD)
        task = schedule.programs[rank][number][0]
        with pytest.raises(ValueError, match=f"{task} on rank {rank} waits for the gradient of st"):
            validate(edit(schedule, rank, to_front(number)))


def test_ranks_that_wait_for_one_another_are_found():
    schedule = edit(one_f_one_b(2, 2), 0, lambda p: [p[0], p[2], p[1], p[3]])
    assert schedule.programs[0][1][0].work is Work.BACKWARD
    validate(schedule)  # slow, and sound
    schedule = edit(schedule, 1, lambda p: [p[0], p[2], p[1], p[3]])
    message = (
        "F of stage 1, micro-batch 1 on rank 1 waits for the output of stage 0, micro-batch 1, "
        "which rank 0 makes only after B of stage 0, micro-batch 0, which waits in turn"
    )
    with pytest.raises(ValueError, match=message):
        validate(schedule)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: [*p, ()], "a step of rank 1 is nothing; only F & B overlap"),
        (lambda p: [p[0] + p[1], *p[2:]], "a step of rank 1 is F of stage 1, micro-batch 0 & F"),
        (lambda p: [*p, (Task(Work.FORWARD, 4, 0),)], "there are 4 stages and 6 micro-batches"),
        (lambda p: [*p, (Task(Work.FORWARD, 0, -1),)], "there are 4 stages and 6 micro-batches"),
        (
            lambda p: [*p, (Task(Work.INPUT_GRAD, 1, 2),)],
            "stage 1, micro-batch 2 has F and I and B, and needs F and B, or F, I and W",
        ),
    ],
)
def test_what_is_no_schedule(change, message):
    with pytest.raises(ValueError, match=message):
        validate(edit(one_f_one_b(4, 6), 1, change))


def test_a_rank_too_few():
    schedule = one_f_one_b(4, 6)
    with pytest.raises(ValueError, match="3 programs for 4 ranks"):
        validate(dataclasses.replace(schedule, programs=schedule.programs[1:]))


@pytest.mark.parametrize(
    ("make", "ranks", "micro", "message"),
    [
        (one_f_one_b, 0, 4, "1F1B needs mesh.pipe of at least 1; found mesh.pipe=0, set mesh.pipe"),
        (zb1p, 4, 0, "ZB1P with mesh.pipe=4 needs at least 1 micro-batches in a step; found 0, a"),
        (dualpipe, 7, 20, "an even number; found mesh.pipe=7, set mesh.pipe=6 or mesh.pipe=8"),
        (dualpipe, 1, 20, "DualPipe needs mesh.pipe of at least 2, an even number; found mesh.pip"),
        (dualpipe, 8, 14, "at least 16 micro-batches in a step, an even number; found 14, and 16"),
        (dualpipe, 8, 21, "at least 16 micro-batches in a step, an even number; found 21, and 22"),
        (dualpipe_v, 4, 7, "DualPipeV with mesh.pipe=4 needs at least 8 micro-batches in a step;"),
        (dualpipe_v, -1, 7, "DualPipeV needs mesh.pipe of at least 1; found mesh.pipe=-1"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_work(make, ranks, micro, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        make(ranks, micro)
    assert "\n" not in str(error.value)
