"""Interleaving of independent computations: one computes while messages of another are under way.

A work is a computation cut into steps. XLA may overlap operations that do not depend on each other,
but it runs two equal works in lockstep: both compute, then both wait. `interleave` orders their
steps by a program of turns, with an optimization barrier between turns that keeps them apart.
"""

from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax import lax

Result = TypeVar("Result")
# A work: yields its live arrays at the end of each step and continues with the arrays sent back.
Steps = Generator[Any, Any, Result]


def run_to_end(work: Steps[Result]) -> Result:
    """Result of a work alone, compiled without barriers between its steps."""
    value = None
    while True:
        try:
            value = work.send(value)
        except StopIteration as end:
            return end.value


def with_scope(name: str, work: Steps[Result]) -> Steps[Result]:
    """Work with its operations under the named scope `name` in the compiled program."""
    value = None
    while True:
        with jax.named_scope(name):
            try:
                value = work.send(value)
            except StopIteration as end:
                return end.value
        value = yield value


def beside(work: Steps[Result], step: int, others: Any) -> Steps[tuple[Result, Any]]:
    """Work whose step `step`, from 1, ends when `others` are computed, too; returns them as well.

    A work with fewer steps returns `others` as they are.
    """
    value, number = None, 0
    while True:
        try:
            value = work.send(value)
        except StopIteration as end:
            return end.value, others
        number += 1
        if number == step:
            value, others = yield value, others
        else:
            value = yield value


def storing(out: dict[str, Any], name: str, work: Steps[Any]) -> Steps[None]:
    """Work that stores its result as `out[name]`."""
    out[name] = yield from work


def interleave(works: Mapping[str, Steps[None]], turns: Sequence[str]) -> None:
    """Runs all works to their ends, in the order of `turns`.

    Args:
      works: name of one letter -> work.
      turns: the program. One string per turn; each letter advances that work by one step (`aab`: a
        twice, b once). A turn's steps all finish before the next turn begins. Works after a bar
        (`a|b`) take no step now, but their next step waits for this turn. A work returns in the
        turn that names it last. No barrier follows what it computes after its last yield, so
        XLA schedules that freely.

    Raises:
      ValueError: a work has more steps than its letters in `turns`.
    """
    values = dict.fromkeys(works)
    for number, turn in enumerate(turns):
        steps, _, waiting = turn.partition("|")
        for name in steps:
            values[name] = works[name].send(values[name])
        fenced = sorted({*steps, *waiting})
        if len(fenced) > 1:
            after = lax.optimization_barrier([values[name] for name in fenced])
            values.update(zip(fenced, after, strict=True))
        later = set().union(*turns[number + 1 :])
        for name in fenced:
            if name not in later:
                _end(works[name], values[name])


def side_by_side(some: str, others: str) -> list[str]:
    """Turns that spread the longer run of steps evenly over the shorter: aaa, bb -> ab, aab."""
    turns = max(1, min(len(some), len(others)))
    return [
        "".join(_share(steps, turn, turns) for steps in (some, others)) for turn in range(turns)
    ]


def _share(steps: str, turn: int, turns: int) -> str:
    return steps[len(steps) * turn // turns : len(steps) * (turn + 1) // turns]


def _end(work: Steps[None], value: Any) -> None:
    try:
        work.send(value)
    except StopIteration:
        return
    raise ValueError("a work has more steps than its turns")
