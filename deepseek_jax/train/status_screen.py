"""Screen on a run of any size, from the object of `run_files.status`."""

import itertools
from collections.abc import Iterable
from typing import Any

from deepseek_jax.train.metrics import Row

BLOCKS = "▁▂▃▄▅▆▇█"
NAMES = 12  # columns of the names of the lines
STYLES = {"training": "bold green", "finished": "bold green", "starting": "bold yellow"}


def screen(found: Row, width: int = 80) -> Any:
    """The screen as something that rich prints.

    Args:
      width: columns of the terminal.
    """
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(expand=True)
    head.add_column(ratio=1, no_wrap=True)
    head.add_column(justify="right", no_wrap=True)
    state = Text(found["state"], style=STYLES.get(found["state"], "bold red"))
    head.add_row(Text(found["workdir"], style="bold"), state)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=NAMES)
    table.add_column(overflow="fold")
    for name, text in lines(found, width):
        table.add_row(name, Text(text))
    bar = Table.grid(expand=True)  # a bar alone does not end its line
    bar.add_row(ProgressBar(total=1.0, completed=found["share"] or 0.0))
    return Group(head, bar, table)


def lines(found: Row, width: int = 80) -> Iterable[tuple[str, str]]:
    """Name and text of each line of the screen."""
    yield (
        "step",
        _joined(
            _number(found["step"], "{:,}"),
            _of(found["tokens"], found["total_tokens"], "tokens"),
            _number(found["share"], "{:.1%}"),
            _number(found["seconds_left"], "{} left", duration),
        ),
    )
    yield (
        "speed",
        _joined(
            _number(found["tokens_per_second"], "{:,.0f} tokens/s"),
            _number(found["step_seconds"], "{:.3g} s a step"),
            _number(found["mfu"], "MFU {:.1%}"),
            _number(found["idle_share"], "idle {:.1%}"),
            _number(found["device_bytes_peak"], "peak {:.1f} GB", lambda x: x / 1e9),
        ),
    )
    yield (
        "loss",
        _joined(
            _number(found["loss"], "{:.4f}")
            if found["step"] is None or found["loss"]
            else "not finite",
            _number(found["mtp_loss"], "MTP {:.4f}"),
            _number(found["grad_norm"], "gradient norm {:.3g}"),
            _number(found["learning_rate"], "learning rate {:.2e}"),
        ),
    )
    losses = [loss for _, loss in found["losses"] if loss is not None]
    if len(losses) > 1:
        yield "", strip(losses, max(width - NAMES - 2, 10))
    yield from _experts(found, width)
    yield from _processes(found)
    yield from _storage(found)
    yield from _events(found)


def _experts(found: Row, width: int) -> Iterable[tuple[str, str]]:
    if not found["experts"]:
        return
    yield (
        "experts",
        _joined(
            _number(found["max_violation"], "MaxVio {:.2f}"),
            f"{found['idle_experts']} of {found['experts']} idle",
            _number(found["dispatch_rounds"], "{:.2f} dispatch rounds at most"),
        ),
    )
    yield (
        f"MoE layer {found['worst_layer'] + 1}",
        strip(found["worst_layer_load"], max(width - NAMES - 2, 10), low=0.0),
    )


def _processes(found: Row) -> Iterable[tuple[str, str]]:
    seen, last = found["processes"], found["processes"]["slowest"]
    if not last:
        return
    yield (
        "processes",
        _joined(
            _of(seen["seen"], seen["expected"], ""),
            f"furthest behind: {last['process']} on {last['host']}, {last['section']}",
            _number(last["step"], "step {:,}"),
            _number(last["seconds"], "for {}", duration),
            _number(last["median_step_seconds"], "median {:.3g} s a step"),
        ),
    )


def _storage(found: Row) -> Iterable[tuple[str, str]]:
    kept = found["checkpoint"]
    if kept["step"] is None:
        yield "checkpoint", _joined("none yet", _number(kept["every_steps"], "due every {} steps"))
    else:
        yield (
            "checkpoint",
            _joined(
                f"step {kept['step']:,}",
                _number(kept["age_seconds"], "{} ago", duration),
                _number(kept["every_steps"], "due every {:,} steps"),
                f"set aside: {', '.join(kept['set_aside'])}" if kept["set_aside"] else "",
            ),
        )
    holder = found["holder"]
    if holder:
        yield "runs as", f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    yield "last row", _number(found["row_age_seconds"], "{} ago", duration) or "none yet"


def _events(found: Row) -> Iterable[tuple[str, str]]:
    yield "restarts", _number(found["restarts"], "{}") or "not known"
    last = found["last_anomaly"]
    told = "none"
    if last:
        told = _joined(
            f"{found['anomalies']}",
            _number(found["skipped_steps"], "{} steps skipped"),
            _number(found["rewinds"], "{} rewinds"),
            f"last: {last['kind']} at step {last['step']:,}, {last.get('action', '')}",
        )
    yield "anomalies", told
    if found["faults"]:
        yield "faults", ", ".join(found["faults"])
    if found["held_out_bits_per_byte"] is not None:
        yield (
            "held-out",
            _joined(
                _number(found["held_out_bits_per_byte"], "{:.3f} bits per byte"),
                _number(found["gzip_bits_per_byte"], "gzip -9 {:.3f}"),
            ),
        )


def strip(values: list[float], width: int, low: float | None = None) -> str:
    """Values as a line of blocks, the largest of each group where there are more than columns.

    Args:
      low: the value of the lowest block; None for the smallest of all.
    """
    groups = min(width, len(values))
    edges = [len(values) * n // groups for n in range(groups + 1)]
    largest = [max(values[a:b]) for a, b in itertools.pairwise(edges)]
    least, most = min(largest) if low is None else low, max(largest)
    span = (most - least) or 1.0
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[max(0, min(top, round((x - least) / span * top)))] for x in largest)


def duration(seconds: float) -> str:
    """Seconds as "12 s", "3 min", "4 h 5 min" or "2 d 3 h"."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _number(value: Any, form: str, change: Any = lambda x: x) -> str:
    return "" if value is None else form.format(change(value))


def _of(part: Any, whole: Any, unit: str) -> str:
    if part is None:
        return ""
    text = f"{part:,}" if not whole else f"{part:,} of {whole:,}"
    return f"{text} {unit}".strip()


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
