"""Text of a search: proposals with the flags that start them, and why the next ones lose."""

import io
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from deepseek_jax.plan.compare_schedules import TITLES

GIB, WIDTH = 2**30, 118
_COLUMNS = (
    "pipe", "replica", "node", "gpu", "tensor", "schedule", "micro", "ZeRO", "recompute", "recipe",
    "GiB", "step, s", "tokens/s",
)  # fmt: skip
_EXECUTIONS = {
    "lockstep": "as this project runs it, in lockstep",
    "asynchronous": "of asynchronous ranks, as published systems run",
}


def text(found: dict[str, Any]) -> str:
    """Text of `search.search`."""
    title = f"{found['devices']:,} {found['hardware']}: {found['tried']:,} layouts tried, time "
    parts = [title + f"{_EXECUTIONS[found['execution']]} (estimated)"]
    parts += [_table("proposed", found["proposed"])]
    for number, row in enumerate(found["proposed"], 1):
        flags = command_line(row["overrides"]) or "the config as it is"
        parts.append(f" {number}  {flags}")
    for key, name in (("slower", "fits, slower"), ("too_large", "does not fit")):
        if found[key]:
            parts.append(_table(name, found[key]))
            parts += [f" {n}  {_loss(row)}" for n, row in enumerate(found[key], 1)]
    return "\n".join([*parts, *_notes(found)])


def command_line(flags: Sequence[str]) -> str:
    """Flags as a shell takes them: `--config.layout.stage_layers=()` needs quotes."""
    return " ".join(map(shlex.quote, flags))


def _table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for number, row in enumerate(rows, 1):
        kind = "two in flight" if row["micro_batches_in_flight"] == 2 else "-"
        table.add_row(
            str(number),
            *(str(size) for size in row["mesh"].values()),
            TITLES[row["pipeline"]] if row["pipeline"] else kind,
            f"{row['micro_batches']} x {row['micro_sequences']}",
            str(row["zero"]),
            row["recompute"],
            row["recipe"],
            f"{row['peak_bytes'] / GIB:.1f}",
            f"{row['seconds']:.3g}" if row["seconds"] < 1 else f"{row['seconds']:.2f}",
            f"{row['tokens_per_device_second']:,.0f}",
        )
    out = io.StringIO()
    Console(file=out, width=WIDTH).print(table)
    lines = out.getvalue().strip("\n").splitlines()
    return "\n".join(["", f"{title}:", *(line.rstrip() for line in lines if line.strip())])


def _loss(row: dict[str, Any]) -> str:
    """Reason why a layout loses."""
    if (over := row.get("over_bytes", 0)) > 0:
        return f"{over / GIB:.1f} GiB too much"
    behind = dict(row["behind"])
    total = behind.pop("total")
    if total <= 0:
        return "no slower"
    part, seconds = max(behind.items(), key=lambda pair: pair[1])
    return f"{_seconds(total)} s slower; {part} {_seconds(seconds)} s more"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.2g}"


def _notes(found: dict[str, Any]) -> Iterator[str]:
    room, reserve = found["room_bytes"] / GIB, found["reserve_bytes"] / GIB
    yield (
        f"A program may use {room:.1f} GiB: {reserve:.0f} are kept for CUDA, messages and "
        "fragmentation. micro: micro-batches"
    )
    yield (
        "x sequences. Each row is the best of its mesh and schedule. A changed recipe changes the "
        "numbers of a run."
    )
    if (given := found["given"]) is not None:
        yield f"The config's own layout: {given['seconds']:.4g} s, {_loss(given)}."
