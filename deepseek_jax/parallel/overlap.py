"""Works that take turns: the steps of one under the messages of another.

A compiler may overlap what does not depend on one another, but it runs two equal works in lockstep:
both compute, then both wait. A fence between turns keeps them a step apart.
"""

from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax import lax

Result = TypeVar("Result")
# Work that yields what it has at the end of each step, and goes on with what is sent back.
Steps = Generator[Any, Any, Result]


def run_to_end(work: Steps[Result]) -> Result:
    """A work's result, its steps compiled as if there were none."""
    value = None
    while True:
        try:
            value = work.send(value)
        except StopIteration as end:
            return end.value


def with_scope(name: str, work: Steps[Result]) -> Steps[Result]:
    """The same work, whose operations carry a name in the compiled program."""
    value = None
    while True:
        with jax.named_scope(name):
            try:
                value = work.send(value)
            except StopIteration as end:
                return end.value
        value = yield value


def storing(out: dict[str, Any], name: str, work: Steps[Any]) -> Steps[None]:
    """The same work, which leaves its result in `out`."""
    out[name] = yield from work


def interleave(works: Mapping[str, Steps[None]], turns: Sequence[str]) -> None:
    """Does every work to its end.

    Args:
      works: by a name of one letter.
      turns: for each turn the names of those that do a step in it, a letter for each step. No step
        begins before all of the turn before are done. After a bar, those that do none in it and
        whose next ones wait for it: "a|b". What follows a work's last step belongs to no turn.
    """
    given = dict.fromkeys(works)
    for number, turn in enumerate(turns):
        steps, _, waiting = turn.partition("|")
        for name in steps:
            given[name] = works[name].send(given[name])
        done = sorted({*steps, *waiting})
        if len(done) > 1:
            fenced = lax.optimization_barrier([given[name] for name in done])
            given.update(zip(done, fenced, strict=True))
        later = set().union(*turns[number + 1 :])
        for name in done:
            if name not in later:
                _end(works[name], given[name])


def side_by_side(some: str, others: str) -> list[str]:
    """Turns for two runs of steps that share them evenly: beside("aa", "bb") is ["ab", "ab"]."""
    turns = max(1, min(len(some), len(others)))
    return [
        "".join(_share(steps, turn, turns) for steps in (some, others)) for turn in range(turns)
    ]


def _share(steps: str, turn: int, turns: int) -> str:
    return steps[len(steps) * turn // turns : len(steps) * (turn + 1) // turns]


def _end(work: Steps[None], given: Any) -> None:
    try:
        work.send(given)
    except StopIteration:
        return
    raise ValueError("a work has more steps than its turns")
