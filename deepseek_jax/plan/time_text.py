"""Text of a plan's times, and of its errors on published systems."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

from deepseek_jax.hardware.efficiency import SOURCES
from deepseek_jax.plan.published_steps import CORRECTED, PublishedStep
from deepseek_jax.plan.published_trace import FITTED, Compared
from deepseek_jax.plan.time_report import CATEGORIES

WIDTH = 110
EXECUTIONS = {
    "lockstep": "this project's lockstep ticks",
    "asynchronous": "asynchronous ranks, as published systems run",
    "one stage": "one stage, without a pipeline",
}


def text(timed: dict[str, Any]) -> str:
    """Text of `time_report.report`."""
    parts = [_steps(timed), _ranks(timed), _layer(timed)]
    if timed["links"]:
        parts.append(_links(timed))
    return "\n".join([*parts, *timed["notes"], _assumed(timed)])


def error_text(steps: Sequence[PublishedStep], trace: Sequence[Compared]) -> str:
    """Text of the plan's errors: published systems, planned by the same code."""
    rows: list[list[str]] = []
    for step in steps:
        rows.append([step.name, *_compared(step.seconds)])
        rows += [[f"  {part.name}", *_compared(part)] for part in step.parts]
    shown = _table(("published step", "predicted, s", "published, s", "error"), rows)
    worst = max(abs(step.seconds.error) for step in steps)
    fitted = [[row.name, *_compared(row)] for row in trace]
    lines = [
        "Error of this plan on published systems; nothing is fitted to these steps:",
        shown,
        CORRECTED,
        f"Largest error of a step: {100 * worst:.0f} %. Assumed where a source is silent:",
        *(f"  {step.name}: {step.assumed}." for step in steps),
        "",
        "The trace that efficiencies are fitted to; an error here is one of description:",
        _table(
            ("one layer of the trace, and its pair of 4 + 4", "fitted, ms", "traced, ms", ""),
            fitted,
        ),
        f"Fitted: {FITTED}.",
    ]
    return "\n".join(lines)


def _compared(row: Compared) -> list[str]:
    return [f"{row.predicted:.2f}", f"{row.published:.2f}", f"{100 * row.error:+.1f} %"]


def _steps(timed: dict[str, Any]) -> str:
    steps = timed["steps"]
    rows = [
        _row("step, s", steps, lambda s: f"{s['seconds']:.3f}"),
        _row("  of it optimizer and its messages, s", steps, lambda s: f"{s['update']:.3f}"),
        _row("tokens/s of a GPU", steps, lambda s: f"{s['tokens_per_device_second']:,.0f}"),
        _row("model TFLOP/s of a GPU, causal", steps, lambda s: f"{s['tflops_causal']:.0f}"),
        _row("  MFU of the 16-bit peak", steps, lambda s: f"{100 * s['mfu_causal']:.1f} %"),
        _row("model TFLOP/s, all scores", steps, lambda s: f"{s['tflops_full']:.0f}"),
        _row("  MFU", steps, lambda s: f"{100 * s['mfu_full']:.1f} %"),
        _row("days", steps, lambda s: f"{s['days']:,.2f}"),
        _row("GPU hours", steps, lambda s: f"{s['device_hours']:,.0f}"),
        _row("dollars", steps, lambda s: _dollars(s["dollars"])),
    ]
    names = [EXECUTIONS[name] for name in steps]
    title = f"{timed['hardware']}, {timed['tokens']:,} tokens (estimated)"
    return _table((title, *names), rows)


def _row(name: str, steps: dict[str, Any], shown: Any) -> list[str]:
    return [name, *(shown(step) for step in steps.values())]


def _dollars(dollars: float | None) -> str:
    return "no price; pass --price" if dollars is None else f"{dollars:,.0f}"


def _ranks(timed: dict[str, Any]) -> str:
    """Table of pipeline ranks, equal neighbours as one row."""
    name, step = list(timed["steps"].items())[-1]
    columns = ("forward", "backward", "weight_gradient", "pairs", "exposed", "bubble")
    shown = [[f"{rank[column]:.3f}" for column in columns] for rank in step["ranks"]]
    rows: list[list[str]] = []
    for number, cells in enumerate(shown):
        if rows and rows[-1][1:] == cells:
            rows[-1][0] = f"{rows[-1][0].split(' to ')[0]} to {number}"
        else:
            rows.append([str(number), *cells])
    heads = ("rank, s", "forward", "backward", "weight grad.", "overlapped", "exposed", "bubble")
    note = "Exposed: waiting for messages, part of the columns before it."
    return f"{_table(heads, rows)}\n{EXECUTIONS[name].capitalize()}. {note}\n"


def _layer(timed: dict[str, Any]) -> str:
    rows = []
    for row in timed["layer"]:
        cells = ["" if row[key] is None else _milliseconds(row[key]) for key in CATEGORIES]
        rows.append([f"{row['part']}, {row['phase']}", *cells, _milliseconds(row["total"])])
    return _table(("one layer and micro-batch, ms", *CATEGORIES, "total"), rows)


def _links(timed: dict[str, Any]) -> str:
    rows = []
    for row in timed["links"]:
        rows.append(
            [
                row["link"],
                f"{row['bytes_of_a_layer'] / 1e6:,.1f}",
                f"{row['buffer_bytes'] / 1e6:,.1f}",
                f"{row['bytes_of_a_step'] / 1e9:,.1f}",
                f"{row['bytes_per_s'] / 1e9:,.1f}",
                _milliseconds(row["seconds_alone"]),
                _milliseconds(row["seconds_beside_matmuls"]),
                f"{100 * row['hidden']:.0f} %",
            ]
        )
    heads = (
        "messages of a layer", "MB", "MB of buffers", "GB a step", "GB/s", "ms alone",
        "ms beside matmuls", "hidden",
    )  # fmt: skip
    return _table(heads, rows)


def _assumed(timed: dict[str, Any]) -> str:
    assumed = timed["assumed"]
    lines = ["Assumed, with source (hardware/efficiency.py, hardware/network.py):"]
    for name, value in assumed.items():
        source = SOURCES.get(name, "hardware/network.py, hardware/chips.py")
        source = "measured, --measured" if name in timed["measured"] else source
        lines.append(
            f"  {name:32}{'not known' if value is None else f'{value:,.6g}':>16}  {source}"
        )
    lines.append(
        f"  {'imbalance of experts':32}{timed['imbalance']:>16,.3g}  --imbalance; 1 is even"
    )
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=WIDTH).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
