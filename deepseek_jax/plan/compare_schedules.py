"""Comparison of pipeline schedules: bubbles and live activations, as a dictionary and as text."""

import io
from typing import Any

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.pipeline.schedule import BY_NAME, Schedule
from deepseek_jax.parallel.pipeline.timeline import bubble_formula, draw, peak_formula, simulate

TITLES = {"1f1b": "1F1B", "zb1p": "ZB1P", "dualpipe": "DualPipe", "dualpipev": "DualPipeV"}


def build(kind: str, pipe: int, micro_batches: int) -> Schedule:
    """Builds the schedule of a kind for `pipe` ranks.

    Raises:
      ConfigError: An unknown kind, or numbers that it does not support.
    """
    if kind not in BY_NAME:
        raise ConfigError(f"there is no schedule {kind!r}; name one of {', '.join(BY_NAME)}")
    return BY_NAME[kind](pipe, micro_batches)


def compare(schedule: Schedule) -> dict[str, Any]:
    """Compares a schedule with those of every kind, at times F = I = W = 1 and F&B = 3.

    DualPipeV has two stages on a rank and the other kinds have one. It is compared at half the
    ranks and half the micro-batches, so that a rank has the same work in all rows.

    Returns:
      "kind", "ranks", "stages" and "micro_batches" of the schedule; "drawing", its text; and
      "schedules", a row for each kind: simulated "makespan", "bubble" and "peak_live" (the largest
      of any rank) beside "bubble_formula" and "peak_live_formula", or "problem", the reason why the
      kind has no schedule of these sizes.
    """
    double = 2 if schedule.kind == "dualpipev" else 1
    return {
        **_sizes(schedule),
        "drawing": draw(schedule),
        "schedules": [
            _row(kind, schedule.ranks * double, schedule.micro_batches * double) for kind in BY_NAME
        ],
    }


def text(compared: dict[str, Any]) -> str:
    """Text of a comparison: the drawing with its key, and a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    names = ("ranks", "micro-batches", "makespan", "bubble", "published", "peak live", "published")
    for name in names:
        table.add_column(name, justify="right")
    notes = []
    for row in compared["schedules"]:
        title = TITLES[row["kind"]]
        if "problem" in row:
            table.add_row(title, *["-"] * len(names))
            notes.append(row["problem"])
            continue
        keys = ("ranks", "micro_batches", "makespan", "bubble", "bubble_formula", "peak_live")
        shown = [f"{row[key]:g}" for key in (*keys, "peak_live_formula")]
        style = "bold" if row["kind"] == compared["kind"] else ""
        table.add_row(title, *shown, style=style)
    out = io.StringIO()
    Console(file=out, width=100).print(table)
    rows = (line.rstrip() for line in out.getvalue().splitlines())
    return "\n".join([compared["drawing"], *_key(compared["kind"]), *rows, *_NOTES, *notes])


_NOTES = (
    "Unit of time: a forward of one stage. F = I = W = 1, B = I + W = 2, F&B = 3, messages 0.",
    "Bubble: idle time of a rank. Peak live: most chunks (stage of a micro-batch) from F to W, B.",
    "Published: by the formulas of the report (table 2) and of DualPipe's repository.",
    "DualPipe hides messages under F&B; these numbers do not include that.",
    "All rows are of asynchronous ranks. Training runs DualPipe and DualPipeV in lockstep, with a",
    "bubble of 20 for 8 stages and 48 for 16, or 11 and 27 with layout.defer_weight_gradients.",
)


def _key(kind: str) -> list[str]:
    """Key to the characters of `draw(schedule)`."""
    if kind not in ("dualpipe", "dualpipev"):
        return ["a forward   A= full backward   A input gradient   x weight gradient   .. idle"]
    two = "enter at the two ends" if kind == "dualpipe" else "go down the ranks and back up"
    return [
        "a b forward   A= B= full backward   A B input gradient   x y weight gradient   .. idle",
        f"a0&B0= forward and backward that overlap; a and b {two}",
    ]


def _row(kind: str, stages: int, micro_batches: int) -> dict[str, Any]:
    """Row of one kind; DualPipeV has two stages on a rank."""
    halves = 2 if kind == "dualpipev" else 1
    try:
        if stages % halves or micro_batches % halves:
            raise ConfigError(
                f"{TITLES[kind]} needs an even number of stages and of micro-batches to compare, "
                f"found {stages} and {micro_batches}"
            )
        schedule = BY_NAME[kind](stages // halves, micro_batches // halves)
    except ConfigError as problem:
        return {"kind": kind, "problem": str(problem)}
    timeline = simulate(schedule)
    return {
        **_sizes(schedule),
        "makespan": timeline.makespan,
        "bubble": max(timeline.bubbles),
        "bubble_formula": bubble_formula(kind, stages),
        "peak_live": max(timeline.peaks),
        "peak_live_formula": peak_formula(kind, stages),
    }


def _sizes(schedule: Schedule) -> dict[str, Any]:
    return {key: getattr(schedule, key) for key in ("kind", "ranks", "stages", "micro_batches")}


INK, IDLE = "#1f2933", "#eef1f4"

INCHES_PER_UNIT, ROW_INCHES, WIDEST = 0.21, 0.44, 26.0
