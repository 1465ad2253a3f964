"""Pipeline schedules as data (1F1B, ZB1P, DualPipe, DualPipeV): the steps of each rank, in order.

Section 3.2.1 of the report, table 2 and figure 5. A stage is a slice of layers, a rank an index
along `mesh.pipe`. Every rank runs its own list of steps in order, and waits for missing inputs.
Schedules hold no times: `timeline.py` simulates and draws them.
"""

import dataclasses
import enum
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from deepseek_jax.config import ConfigError


class Work(enum.Enum):
    """Kinds of tasks; zero bubble schedules split the backward B into I and W."""

    FORWARD = "F"
    INPUT_GRAD = "I"  # the previous stage waits for it
    WEIGHT_GRAD = "W"  # no stage waits for it, so it can fill bubbles
    BACKWARD = "B"  # both gradients


@dataclasses.dataclass(frozen=True)
class Task:
    """Work of a stage for one micro-batch; `micro` numbers both streams of DualPipe together."""

    work: Work
    stage: int
    micro: int

    @property
    def gives(self) -> "Result":
        """Result of the task for which others may wait; of a BACKWARD, the input's gradient."""
        names = {Work.FORWARD: "output", Work.WEIGHT_GRAD: "weight gradient"}
        return Result(names.get(self.work, "gradient"), self.stage, self.micro)

    def __str__(self) -> str:
        return f"{self.work.value} of stage {self.stage}, micro-batch {self.micro}"


class Result(NamedTuple):
    """Result of a task: a stage's "output", its input's "gradient", or its "weight gradient"."""

    name: str
    stage: int
    micro: int


Step = tuple[Task, ...]  # one task, or an overlapped forward and backward


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Steps of each rank.

    Attributes:
      kind: a key of `BY_NAME`.
      ranks, stages, micro_batches: numbers of each; micro-batches over both streams.
      programs: [rank][step]; a step of two tasks is an overlapped FORWARD and BACKWARD.
    """

    kind: str
    ranks: int
    stages: int
    micro_batches: int
    programs: tuple[tuple[Step, ...], ...]

    def owner(self, stage: int, micro: int) -> int:
        """Rank that runs this stage for this micro-batch.

        DualPipe holds each stage on two mirror ranks, one for each stream. The stages of DualPipeV
        go down the ranks and back up.
        """
        if self.kind == "dualpipe" and micro >= self.micro_batches // 2:
            return self.ranks - 1 - stage
        return min(stage, 2 * self.ranks - 1 - stage)

    def stream(self, task: Task) -> tuple[int, int]:
        """Label of a task in figures: its stream, 0 or 1, and its micro-batch's number there.

        DualPipe's streams enter at opposite ends. Those of DualPipeV are the stages on the way down
        the ranks and on the way up.
        """
        if self.kind == "dualpipe":
            return divmod(task.micro, self.micro_batches // 2)
        return int(task.stage >= self.ranks), task.micro

    def needs(self, task: Task) -> list[Result]:
        """Results that the task takes as inputs."""
        stage, micro = task.stage, task.micro
        if task.work is Work.FORWARD:
            return [Result("output", stage - 1, micro)] if stage else []
        if task.work is Work.WEIGHT_GRAD:
            return [Result("gradient", stage, micro)]
        later = [Result("gradient", stage + 1, micro)] if stage < self.stages - 1 else []
        return [Result("output", stage, micro), *later]

    def order(self) -> Iterator[tuple[int, int]]:
        """Every (rank, step) once, after its inputs: a run of the programs without times.

        Raises:
          ValueError: the ranks deadlock; the message names a task that never starts.
        """
        done: set[Result] = set()
        at = [0] * self.ranks
        moved = True
        while moved:
            moved = False
            for rank, program in enumerate(self.programs):
                while at[rank] < len(program):
                    step = program[at[rank]]
                    if not all(need in done for task in step for need in self.needs(task)):
                        break
                    yield rank, at[rank]
                    done.update(task.gives for task in step)
                    at[rank] += 1
                    moved = True
        if any(at[rank] < len(program) for rank, program in enumerate(self.programs)):
            raise ValueError(self._deadlock(at, done))

    def _deadlock(self, at: list[int], done: set[Result]) -> str:
        """Message for a deadlock: follows waiting ranks to the task that closes the circle."""
        waits = {
            rank: next(
                (task, need)
                for task in program[at[rank]]
                for need in self.needs(task)
                if need not in done
            )
            for rank, program in enumerate(self.programs)
            if at[rank] < len(program)
        }
        rank, seen = min(waits), set()
        while rank in waits and rank not in seen:
            seen.add(rank)
            waiting, (task, need) = rank, waits[rank]
            rank = self.owner(need.stage, need.micro)
        if rank not in waits:
            why = "never makes"
        elif rank == waiting:
            why = "makes only later"
        else:
            why = f"makes only after {waits[rank][0]}, which waits in turn"
        what = f"the {need.name} of stage {need.stage}, micro-batch {need.micro}"
        return f"{task} on rank {waiting} waits for {what}, which rank {rank} {why}"


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """1F1B: backward as soon as possible, so that a rank holds at most `ranks` micro-batches.

    Source: PipeDream (Harlap et al., 2018); table 2 of the report.

    Raises:
      ConfigError: fewer than one rank or micro-batch.
    """
    _check("1F1B", ranks, micro_batches)
    return _schedule("1f1b", ranks, ranks, micro_batches, _one_way(ranks, micro_batches))


def zb1p(ranks: int, micro_batches: int) -> Schedule:
    """ZB1P (zero bubble): 1F1B with W deferred by `rank` micro-batches, so that it fills the end.

    The bubble equals the published formula from `ranks` micro-batches on.

    Source: ZB-H1 of Zero Bubble Pipeline Parallelism (Qi et al., 2023); table 2 of the report.

    Raises:
      ConfigError: fewer than one rank or micro-batch.
    """
    _check("ZB1P", ranks, micro_batches)
    return _schedule(
        "zb1p", ranks, ranks, micro_batches, _one_way(ranks, micro_batches, split=True)
    )


def dualpipe(ranks: int, micro_batches: int) -> Schedule:
    """DualPipe: half of the micro-batches enter at each end; forwards and backwards overlap.

    Rank r holds stage r for the first half and stage ranks-1-r for the second, so each stage is on
    two ranks. Mirror ranks run the same steps.

    Source: section 3.2.1 and figure 5 of the report, and the steps of DeepSeek's released code.

    Raises:
      ConfigError: odd ranks, odd micro-batches, or fewer than two micro-batches for each rank.
    """
    _check("DualPipe", ranks, micro_batches, even=True, each=2)
    many = micro_batches // 2

    def program(rank: int) -> Iterator[Step]:
        mirror = ranks - 1 - rank
        near = int(rank > mirror)  # the stream that enters at this rank's end

        def task(work: Work, phase: int, number: int) -> Task:
            stream = phase ^ near
            return Task(work, mirror if stream else rank, stream * many + number)

        return _eight_steps(min(rank, mirror), ranks // 2, many, task)

    return _schedule("dualpipe", ranks, ranks, micro_batches, program)


def dualpipe_v(ranks: int, micro_batches: int) -> Schedule:
    """DualPipeV: DualPipe cut in half, with 2 * ranks stages that go down the ranks and back up.

    Rank r holds stages r and 2*ranks-1-r, and no stage is on two ranks. The last rank sends to
    itself.

    Source: DeepSeek's DualPipe repository, after Sea AI Lab's "cut in half".

    Raises:
      ConfigError: no rank, or fewer than two micro-batches for each rank.
    """
    _check("DualPipeV", ranks, micro_batches, each=2)

    def program(rank: int) -> Iterator[Step]:
        stages = (rank, 2 * ranks - 1 - rank)
        return _eight_steps(
            rank,
            ranks,
            micro_batches,
            lambda work, phase, number: Task(work, stages[phase], number),
        )

    return _schedule("dualpipev", ranks, 2 * ranks, micro_batches, program)


BY_NAME: dict[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_f_one_b,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipe_v,
}


def validate(schedule: Schedule) -> None:
    """Checks that every task runs once, after its inputs, on the rank that owns its stage.

    Raises:
      ValueError: the message names the task or step that does not.
    """
    if len(schedule.programs) != schedule.ranks:
        raise ValueError(f"{len(schedule.programs)} programs for {schedule.ranks} ranks")
    seen: set[Task] = set()
    for rank, program in enumerate(schedule.programs):
        for step in program:
            if len(step) != 1 and [t.work for t in step] != [Work.FORWARD, Work.BACKWARD]:
                found = " & ".join(map(str, step)) or "nothing"
                raise ValueError(f"a step of rank {rank} is {found}; only F & B overlap")
            for task in step:
                _check_place(schedule, rank, task)
                if task in seen:
                    raise ValueError(f"{task} is on rank {rank} twice")
                seen.add(task)
    for stage, micro in itertools.product(range(schedule.stages), range(schedule.micro_batches)):
        works = "".join(work.value for work in Work if Task(work, stage, micro) in seen)
        if works not in ("FB", "FIW"):
            raise ValueError(
                f"stage {stage}, micro-batch {micro} has {' and '.join(works) or 'no task'}, and "
                "needs F and B, or F, I and W"
            )
    deque(schedule.order(), maxlen=0)  # runs the schedule to its end


def _one_way(
    ranks: int, micro_batches: int, split: bool = False
) -> Callable[[int], Iterator[Step]]:
    """Program of each rank where all micro-batches enter at rank 0; `split` defers W."""

    def program(rank: int) -> Iterator[Step]:
        ahead = min(ranks - rank, micro_batches)
        for micro in range(ahead):
            yield (Task(Work.FORWARD, rank, micro),)
        for micro in range(micro_batches):
            yield (Task(Work.INPUT_GRAD if split else Work.BACKWARD, rank, micro),)
            if split and micro >= rank:
                yield (Task(Work.WEIGHT_GRAD, rank, micro - rank),)
            if micro + ahead < micro_batches:
                yield (Task(Work.FORWARD, rank, micro + ahead),)
        for micro in range(max(micro_batches - rank, 0), micro_batches if split else 0):
            yield (Task(Work.WEIGHT_GRAD, rank, micro),)

    return program


def _eight_steps(
    h: int, half: int, many: int, task: Callable[[Work, int, int], Task]
) -> Iterator[Step]:
    """DualPipe's program of a rank with `h` ranks before it and `half - h - 1` before the middle.

    `task` makes a task from its work, its phase (0: the micro-batch entered at this rank's end, 1:
    at the other) and its number among the `many` micro-batches of the phase.
    """
    rest = half - h - 1
    numbers = {(work, phase): itertools.count() for work in Work for phase in (0, 1)}
    queue: deque[Task] = deque()

    def forward(phase: int) -> Task:
        return task(Work.FORWARD, phase, next(numbers[Work.FORWARD, phase]))

    def backward(phase: int, split: bool = False) -> Task:
        number = next(numbers[Work.BACKWARD, phase])
        if split:
            queue.append(task(Work.WEIGHT_GRAD, phase, number))
        return task(Work.INPUT_GRAD if split else Work.BACKWARD, phase, number)

    for _ in range(2 * rest):  # 1: fill
        yield (forward(0),)
    for _ in range(h + 1):  # 2: the streams meet
        yield (forward(0),)
        yield (forward(1),)
    for _ in range(rest):  # 3: zero bubble: input gradients leave early, W fills the wait
        yield (backward(1, split=True),)
        yield (queue.popleft(),)
        yield (forward(1),)
    for turn in range(many - 2 * half + h + 1):  # 4: the main part
        if turn == 0 and rest == 0:  # not overlapped on a middle rank: others wait for this F
            yield (forward(0),)
            yield (backward(1),)
        else:
            yield forward(0), backward(1)
        yield forward(1), backward(0)
    for _ in range(rest):  # 5: no forwards of phase 0 are left
        yield (backward(1),)
        yield forward(1), backward(0)
    for turn in range(2 * (h + 1)):  # 6: drain; the second half defers W
        yield (backward(1 - turn % 2, split=turn >= h + 1),)
    for _ in range(rest):  # 7: zero bubble: deferred W between input gradients
        yield (queue.popleft(),)
        yield (backward(0, split=True),)
    while queue:  # 8: the remaining W
        yield (queue.popleft(),)


def _schedule(
    kind: str, ranks: int, stages: int, micro: int, program: Callable[[int], Iterator[Step]]
) -> Schedule:
    programs = tuple(tuple(program(rank)) for rank in range(ranks))
    return Schedule(kind, ranks, stages, micro, programs)


def _check(name: str, ranks: int, micro: int, even: bool = False, each: int = 0) -> None:
    """Raises ConfigError unless each rank has `each` micro-batches, and the step at least one."""
    unit, parity = (2, ", an even number") if even else (1, "")
    if ranks < unit or ranks % unit:
        near = f"{ranks - 1} or mesh.pipe={ranks + 1}" if ranks > unit else unit
        raise ConfigError(
            f"{name} needs mesh.pipe of at least {unit}{parity}; found mesh.pipe={ranks}, set "
            f"mesh.pipe={near}"
        )
    least = max(each * ranks, 1)
    if micro < least or micro % unit:
        raise ConfigError(
            f"{name} with mesh.pipe={ranks} needs at least {least} micro-batches in a step{parity}"
            f"; found {micro}, and {max(least, micro + micro % unit)} would do"
        )


def _check_place(schedule: Schedule, rank: int, task: Task) -> None:
    """Raises ValueError unless the task exists and `rank` owns its stage."""
    stages, micro_batches = schedule.stages, schedule.micro_batches
    if task.stage not in range(stages) or task.micro not in range(micro_batches):
        raise ValueError(
            f"{task} on rank {rank}: there are {stages} stages and {micro_batches} micro-batches"
        )
    if (owner := schedule.owner(task.stage, task.micro)) != rank:
        raise ValueError(f"{task} is on rank {rank}, and its stage is on rank {owner}")
