"""Text of a comparison with ablations: a table for each machine, and what its rows mean."""

import io
import textwrap
from collections.abc import Iterator
from typing import Any

GIB, GB, KB = 2**30, 1e9, 1e3
WIDTH = 118
_COLUMNS = (
    "step, s", "change", "exposed", "GiB", "change", "fits", "tokens/s", "GPU h", "price",
    "cache, KB",
)  # fmt: skip


def text(compared: dict[str, Any]) -> str:
    """Text of `ablations.compare`."""
    parts = [_table(compared, name) for name in compared["machines"]]
    return "\n".join([*parts, *_notes(compared)])


def is_compared(row: dict[str, Any]) -> bool:
    """Whether a row has figures of any machine."""
    return any(found["seconds"] is not None for found in row["chips"].values())


def name(row: dict[str, Any]) -> str:
    """Name of a row: the idea, and its replacement."""
    return f"{row['answer']} -> {row['instead']}" if row["instead"] else row["answer"]


def _table(compared: dict[str, Any], chip: str) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(f"{compared['devices']:,} x {chip}", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    base = compared["rows"][0]
    for row in filter(is_compared, compared["rows"]):
        found = row["chips"][chip]
        cells = _cells(row, found, base) if found["seconds"] is not None else []
        table.add_row(name(row), *(cells or ["-"] * len(_COLUMNS)))
    out = io.StringIO()
    Console(file=out, width=WIDTH).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _cells(row: dict[str, Any], found: dict[str, Any], base: dict[str, Any]) -> list[str]:
    is_base, cache = row is base, row["cache_bytes_per_token"]
    shown = is_base or cache != base["cache_bytes_per_token"]
    return [
        f"{found['seconds']:.2f}",
        "" if is_base else f"{100 * found['change']:+.1f} %",
        f"{found['exposed']:.2f}",
        f"{found['peak_bytes'] / GIB:.1f}",
        "" if is_base else f"{found['peak_change'] / GIB:+.1f}",
        "yes" if found["fits"] else "no",
        f"{found['tokens_per_device_second']:,.0f}",
        scaled(found["device_hours"]),
        "-" if found["dollars"] is None else f"${scaled(found['dollars'])}",
        f"{cache / KB:,.1f}" if shown else "",
    ]


def scaled(value: float) -> str:
    """Number with three digits, and K, M or T for thousands, millions or trillions."""
    units = ((1e12, "T"), (1e6, "M"), (1e3, "K"), (1.0, ""))
    size, letter = next((unit for unit in units if abs(value) >= unit[0]), units[-1])
    digits = max(0, 2 - len(str(int(value / size))) + 1)
    return f"{value / size:.{digits}f}{letter}"


def _notes(compared: dict[str, Any]) -> Iterator[str]:
    tokens = scaled(compared["tokens"])
    yield "Estimated. Each row changes one thing and keeps the batch and the number of GPUs; times"
    yield f"and memory are those of asynchronous ranks. GPU h, price: {tokens} tokens, no stops."
    yield "Exposed: seconds of a step in which the rank that waits most waits for messages."
    yield "GiB: peak of a GPU. Cache: KB per token of a served model in 16 bits, where it changes."
    for chip, machine in compared["machines"].items():
        dollars = machine["dollars_per_hour"]
        price = "" if dollars is None else f", ${dollars:.2f} an hour"
        yield (
            f"{chip}: {machine['room_bytes'] / GIB:.1f} GiB for a program, NVLink "
            f"{machine['inside_bytes_per_s'] / GB:.0f} and InfiniBand "
            f"{machine['between_bytes_per_s'] / GB:.1f} GB/s{price}."
        )
    for row in filter(is_compared, compared["rows"]):
        yield f"  {name(row)}: {'; '.join([row['effect'], *_reasons(row, compared)])}."
    if absent := [name(row) for row in compared["rows"] if not is_compared(row)]:
        left_out = f"Left out, because the config has no such thing: {', '.join(absent)}."
        yield from textwrap.wrap(left_out, WIDTH - 8)


def _reasons(row: dict[str, Any], compared: dict[str, Any]) -> Iterator[str]:
    """Reasons why a row cannot be run as it is."""
    if row["problem"]:
        yield row["problem"]
    over: dict[str, list[str]] = {}
    for chip, found in row["chips"].items():
        if found["problem"]:
            yield f"{chip}: {found['problem']}"
        elif not found["fits"]:
            more = found["peak_bytes"] - compared["machines"][chip]["room_bytes"]
            over.setdefault(f"{more / GIB:.1f}", []).append(chip)
    for more, chips in over.items():
        yield f"{more} GiB too much for {' and '.join(chips)}"
