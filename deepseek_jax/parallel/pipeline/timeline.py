"""Simulated times of a schedule with free messages: bubbles, live activations, and the figure.

The formulas are from table 2 of the report and DeepSeek's DualPipe repository, for PP stages.
"""

import dataclasses
from typing import Protocol

from deepseek_jax.parallel.pipeline.schedule import Result, Schedule, Step, Task, Work


class StepCosts(Protocol):
    """Times of steps, which may differ between stages."""

    def of(self, step: Step) -> float:
        """Time of a step."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Times of the steps of one stage, all in one unit.

    Attributes:
      forward, input_grad, weight_grad: F, I and W; a full backward B is I + W.
      pair: F&B, an overlapped forward and backward. None: F + B, where only messages overlap.
    """

    forward: float = 1
    input_grad: float = 1
    weight_grad: float = 1
    pair: float | None = None

    @property
    def backward(self) -> float:
        """Time of a full backward, B."""
        return self.input_grad + self.weight_grad

    @property
    def overlapped(self) -> float:
        """Time of an overlapped forward and backward, F&B."""
        return self.forward + self.backward if self.pair is None else self.pair

    def of(self, step: Step) -> float:
        """Time of a step."""
        if len(step) > 1:
            return self.overlapped
        return {
            Work.FORWARD: self.forward,
            Work.INPUT_GRAD: self.input_grad,
            Work.WEIGHT_GRAD: self.weight_grad,
            Work.BACKWARD: self.backward,
        }[step[0].work]


UNIT = Costs()  # F = I = W = 1, B = 2, F&B = 3, as in the figure


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Times of a schedule from time 0, in the unit of its costs.

    Attributes:
      starts, ends: [rank][step].
      makespan: time at which the last rank finishes.
      bubbles: [rank], time within the makespan without a step.
      peaks: [rank], the most chunks live at once: from their F to the end of their W or B.
    """

    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    makespan: float
    bubbles: tuple[float, ...]
    peaks: tuple[int, ...]


def simulate(schedule: Schedule, costs: StepCosts = UNIT, hop: float = 0) -> Timeline:
    """Runs every rank's program in order, each step as soon as its inputs are ready.

    Args:
      schedule: Programs of the ranks.
      costs: Times of their steps.
      hop: Time from a result to its arrival on another rank.

    Raises:
      ValueError: the programs deadlock.
    """
    ready: dict[Result, float] = {}
    starts: list[list[float]] = [[] for _ in schedule.programs]
    ends: list[list[float]] = [[] for _ in schedule.programs]
    for rank, number in schedule.order():
        step = schedule.programs[rank][number]
        inputs = (
            ready[need] + hop * (schedule.owner(need.stage, need.micro) != rank)
            for task in step
            for need in schedule.needs(task)
        )
        start = max(ends[rank][-1] if number else 0, *inputs, 0)
        starts[rank].append(start)
        ends[rank].append(start + costs.of(step))
        ready.update((task.gives, ends[rank][-1]) for task in step)
    makespan = max(times[-1] for times in ends if times)
    busy = (sum(map(costs.of, program)) for program in schedule.programs)
    return Timeline(
        starts=tuple(map(tuple, starts)),
        ends=tuple(map(tuple, ends)),
        makespan=makespan,
        bubbles=tuple(makespan - each for each in busy),
        peaks=tuple(map(_peak, schedule.programs)),
    )


def bubble_formula(kind: str, stages: int, costs: Costs = UNIT) -> float:
    """Published bubble of a rank, in the unit of the costs, for a kind of `schedule.BY_NAME`.

    The bubble of DualPipe's released steps is at most this where W <= F <= I and
    B <= F&B <= F + B, and equals it where F = I. That of ZB1P equals it from PP micro-batches on
    where W <= F and W <= I.
    """
    forward, backward, weight = costs.forward, costs.backward, costs.weight_grad
    both_ways = (stages // 2 - 1) * (costs.overlapped + backward - 3 * weight)
    return {
        "1f1b": (stages - 1) * (forward + backward),
        "zb1p": (stages - 1) * (forward + backward - 2 * weight),
        "dualpipe": both_ways,
        "dualpipev": both_ways,
    }[kind]


def peak_formula(kind: str, stages: int) -> int:
    """Published peak of live chunks of a rank; a chunk is one stage for one micro-batch."""
    return stages if kind in ("1f1b", "zb1p") else stages + 1


def draw(schedule: Schedule) -> str:
    """Drawing of the schedule in text, like figure 5 of the report, at F = I = W = 1 and F&B = 3.

    There is a line for each rank; a unit of time is as wide as "a7". a and b are forwards of the
    two streams (of DualPipeV: on the way down and on the way up). A and B are their backwards: one
    unit for input gradients only, filled up with "=" for both gradients. x and y are weight
    gradients, "a7&B3=" is an overlapped forward and backward, and ".." is idle.
    """
    timeline = simulate(schedule)
    tasks = (task for program in schedule.programs for step in program for task in step)
    digits = max(len(str(schedule.stream(task)[1])) for task in tasks)
    width, rank_width = 1 + digits, len(str(schedule.ranks - 1))
    lines = []
    for rank, program in enumerate(schedule.programs):
        line = ""
        for step, start, end in zip(
            program, timeline.starts[rank], timeline.ends[rank], strict=True
        ):
            label = "&".join(_label(schedule, task, digits) for task in step)
            line = line.ljust(int(start) * width, ".") + label
            line = line.ljust(int(end) * width, "=")
        line = line.ljust(int(timeline.makespan) * width, ".")
        lines.append(f"rank {rank:>{rank_width}} |{line}|")
    return "\n".join(lines)


_LETTERS = {
    Work.FORWARD: "ab",
    Work.INPUT_GRAD: "AB",
    Work.BACKWARD: "AB",
    Work.WEIGHT_GRAD: "xy",
}


def _label(schedule: Schedule, task: Task, digits: int) -> str:
    stream, number = schedule.stream(task)
    return f"{_LETTERS[task.work][stream]}{number:0{digits}}"


def _peak(program: tuple[Step, ...]) -> int:
    """Peak of the chunks that are live at once."""
    live = peak = 0
    for step in program:
        live += sum(task.work is Work.FORWARD for task in step)
        peak = max(peak, live)
        live -= sum(task.work in (Work.BACKWARD, Work.WEIGHT_GRAD) for task in step)
    return peak
