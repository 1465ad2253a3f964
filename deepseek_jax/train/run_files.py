"""State of a run, read from the files of its workdir alone, on any machine that sees the folder.

Nothing here imports JAX, waits for the run, locks or changes a file. Only the end of
`metrics.jsonl` is read, since a row of V3 takes 150 KB. Any file may be absent, or be replaced
meanwhile, or hold what is no number where one belongs, which counts as not known.
`progress/process_N.json` is described in `runtime/progress.py`.
"""

import contextlib
import math
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

from deepseek_jax.train.anomalies import ANOMALIES, read_anomalies
from deepseek_jax.train.metrics import METRICS, SUMMARY, Row, json_object, plain

TAIL_BYTES = 1 << 22
LOSSES = 80  # last rows whose losses are told
IDLE_SHARE = 0.1  # of the mean load, below which an expert counts as idle
SILENT_SECONDS = 120.0  # at least, without a sign of a run that holds its lock

_FROM_ROW = (
    "step", "tokens", "loss", "mtp_loss", "grad_norm", "learning_rate", "tokens_per_second",
    "step_seconds", "idle_share", "mfu", "device_bytes_peak", "skipped_steps", "rewinds",
)  # fmt: skip
_FROM_SUMMARY = ("held_out_bits_per_byte", "gzip_bits_per_byte", "ema_bits_per_byte")


def status(workdir: Path, now: float | None = None) -> Row:
    """State of the run in `workdir` as one JSON object; `docs/metrics.md` describes its fields.

    Args:
      now: Unix seconds; None for those of this machine's clock.
    """
    now = time.time() if now is None else now
    config, summary = _object(workdir / "config.json"), _object(workdir / SUMMARY)
    rows = tail(workdir / METRICS)
    row = rows[-1] if rows else {}
    found: Row = {"workdir": str(workdir), "time": now}
    found |= {key: _number(row.get(key)) for key in _FROM_ROW}
    found["losses"] = [[each["step"], _number(each.get("loss"))] for each in rows[-LOSSES:]]
    written = _age(workdir / METRICS, now)  # a run makes the file before its first row
    found["row_age_seconds"] = written if rows else None
    found |= _remaining(config, row)
    found |= _experts(rows)
    found["processes"] = processes = _processes(workdir / "progress", now)
    found["checkpoint"] = _checkpoint(workdir / "checkpoints", config, now)
    found["restarts"] = _restarts(workdir, row)
    anomalies = [row for row in _anomalies(workdir) if _number(row["step"]) is not None]
    found["anomalies"] = len(anomalies)
    found["last_anomaly"] = anomalies[-1] if anomalies else None
    names = _names(workdir)
    found["faults"] = [name for name in names if name[:6] + name[-4:] == "fault-.log"]
    found |= {key: _number(summary.get(key)) for key in _FROM_SUMMARY}
    holder = _object(workdir / ".lock")
    found["holder"] = {key: holder.get(key) for key in ("host", "pid", "since")} if holder else None
    quiet = [written, processes["newest_beat_seconds"]]
    signs = [age for age in quiet if age is not None]
    every = _number(_section(config, "log").get("every_steps")) or 1
    patience = max(SILENT_SECONDS, 20 * (found["step_seconds"] or 0) * every)
    found["state"] = _state(holder, summary, row, min(signs, default=None), patience)
    return plain(found)


def _state(holder: Row, summary: Row, row: Row, quiet: float | None, patience: float) -> str:
    """Word for the run: training, starting, silent, killed, finished, stopped or empty."""
    if holder:
        if holder.get("host") == socket.gethostname() and not _lives(holder.get("pid")):
            return "killed"
        if quiet is not None and quiet > patience:
            return "silent"
        return "training" if row else "starting"
    if summary and (_number(summary.get("step")) or 0) >= (row.get("step") or 0):
        return "finished"
    return "stopped" if row else "empty"


def _lives(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, TypeError, OverflowError):
        pass
    return True


def tail(path: Path, size: int = TAIL_BYTES) -> list[Row]:
    """The last rows of a `metrics.jsonl`: those that lie whole in its last `size` bytes."""
    try:
        with path.open("rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - size)
            file.seek(start)
            lines = file.read(size).split(b"\n")
    except OSError:
        return []
    rows: list[Row] = []
    for line in lines[1:] if start else lines:
        row = json_object(line)
        if isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _object(path: Path) -> dict[str, Any]:
    """The JSON object of a small file; empty where there is none."""
    with contextlib.suppress(OSError):
        return json_object(path.read_text(errors="replace"))
    return {}


def _number(value: Any) -> Any:
    """A finite number, or None for anything else."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return value if known and abs(value) < math.inf else None


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _names(folder: Path) -> list[str]:
    """Names in a folder, which may go away at any moment, in order."""
    with contextlib.suppress(OSError):
        return sorted(os.listdir(folder))
    return []


def _anomalies(workdir: Path) -> list[Row]:
    with contextlib.suppress(OSError):
        return read_anomalies(workdir / ANOMALIES)
    return []


def _age(path: Path, now: float) -> float | None:
    with contextlib.suppress(OSError):
        return max(0.0, now - path.stat().st_mtime)
    return None


def _remaining(config: dict[str, Any], row: Row) -> Row:
    total = _number(_section(config, "schedule").get("tokens"))
    tokens, rate = _number(row.get("tokens")) or 0, _number(row.get("tokens_per_second"))
    left = None if not total or not rate else max(total - tokens, 0) / rate
    share = min(tokens / total, 1.0) if total else None
    return {"total_tokens": total, "share": share, "seconds_left": left}


def _experts(rows: list[Row]) -> Row:
    """Load of the experts in the last row that has it."""
    row = next((each for each in reversed(rows) if _lists(each.get("expert_load"))), {})
    layers = [[_number(x) or 0.0 for x in layer] for layer in _lists(row.get("expert_load"))]
    means = [sum(layer) / len(layer) for layer in layers]
    relative = [
        [share / mean if mean else 0.0 for share in layer]
        for layer, mean in zip(layers, means, strict=True)
    ]
    worst = max(range(len(relative)), key=lambda n: max(relative[n]), default=None)
    [rounds] = _lists([row.get("dispatch_rounds")]) or [[]]
    rounds = [each for each in rounds if _number(each) is not None]
    return {
        "max_violation": _number(row.get("max_violation")),
        "worst_layer": worst,
        "worst_layer_load": [] if worst is None else [round(x, 3) for x in relative[worst]],
        "idle_experts": sum(x < IDLE_SHARE for layer in relative for x in layer),
        "experts": sum(map(len, relative)),
        "dispatch_rounds": max(rounds, default=None),
    }


def _lists(value: Any) -> list[list[Any]]:
    """The lists in a list, without empty ones."""
    found = value if isinstance(value, list) else []
    return [each for each in found if isinstance(each, list) and each]


def _processes(folder: Path, now: float) -> Row:
    """Processes that have told of their progress, and the one that is furthest behind."""
    texts, found = ("host", "section"), []
    for name in _names(folder):
        ours = name.startswith("process_") and name.endswith(".json")
        told = _object(folder / name) if ours else {}
        if _number(told.get("process")) is not None:
            found.append({k: v if k in texts else _number(v) for k, v in told.items()})
    newest = max((each.get("attempt") or 0 for each in found), default=0)
    found = [each for each in found if (each.get("attempt") or 0) == newest]
    medians = [each["median_step_seconds"] for each in found if each.get("median_step_seconds")]
    beats = [max(0.0, now - each["beat"]) for each in found if each.get("beat")]
    out: Row = {
        "expected": max((each.get("processes") or 0 for each in found), default=None),
        "seen": len(found),
        "median_step_seconds": statistics.median(medians) if medians else None,
        "newest_beat_seconds": min(beats, default=None),
        "slowest": None,
    }
    if found:
        last = min(found, key=lambda each: (each.get("step") or 0, each.get("time") or 0.0))
        keys = ("process", "host", "section", "step", "median_step_seconds")
        out["slowest"] = {key: last.get(key) for key in keys}
        out["slowest"]["seconds"] = max(0.0, now - (last.get("time") or now))
    return out


def _checkpoint(folder: Path, config: dict[str, Any], now: float) -> Row:
    names = _names(folder)
    step = max((int(name) for name in names if name.isdecimal()), default=None)
    settings = _section(config, "checkpoint")
    return {
        "step": step,
        "age_seconds": None if step is None else _age(folder / str(step), now),
        "every_steps": _number(settings.get("every_steps")),
        "set_aside": [name for name in names if name.endswith(".broken")],
    }


def _restarts(workdir: Path, row: Row) -> int | None:
    """Starts after the first one; a start and a rewind each begin a file of TensorBoard events."""
    told = _object(workdir / "progress" / "restarts.json").get("attempt")
    if isinstance(told, int):
        return told
    begun = sum(name.startswith("events.out.tfevents.") for name in _names(workdir / "tensorboard"))
    return max(0, begun - 1 - (_number(row.get("rewinds")) or 0)) if begun else None
