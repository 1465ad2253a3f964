"""Planned peak memory beside what the compiler reported: errors by row, and by kind of layout."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.model.count import count
from deepseek_jax.plan.device_memory import GIB, device_memory

ONE, TWO, STAGES = "one stage", "one stage, two micro-batches in flight", "stages of small models"
V3_FP8, V3_BF16 = "V3's stages in FP8", "V3's stages in BF16"

# Kind -> lowest and highest error in percent, and number of rows of docs/data/compiled_memory.json;
# a test holds them against that file.
BY_KIND = {
    ONE: (-3, 7, 16),
    TWO: (-4, 6, 5),
    STAGES: (-4, 10, 6),
    V3_FP8: (-3, 1, 2),
    V3_BF16: (0, 0, 2),
}
V3_PARAMETERS_LEAST = 300e9


def kind_of(config: Config) -> str:
    """Kind of a layout, one of BY_KIND."""
    if config.mesh.pipe == 1:
        return TWO if config.layout.micro_batches_in_flight > 1 else ONE
    if count(config.model).total < V3_PARAMETERS_LEAST:
        return STAGES
    return V3_FP8 if config.precision.recipe == "fp8" else V3_BF16


def text(kind: str) -> str:
    """Lines of the errors by kind, that of a layout at hand marked."""
    many = sum(rows for *_, rows in BY_KIND.values())
    lines = [f"Error of the plan on {many} programs compiled for H100s (docs/performance.md):"]
    for name, (low, high, rows) in BY_KIND.items():
        mark = "  <- this layout" if name == kind else ""
        lines.append(f"  {name:40}{low:>+4} to {high:+} %, {rows} rows{mark}")
    return "\n".join(lines)


def errors(file: Path, load: Callable[[str, Mapping[str, Any]], Config]) -> list[dict[str, Any]]:
    """Compares planned with reported peaks.

    Args:
      file: JSON with "rows", as docs/data/compiled_memory.json: "name", "config", "overrides",
        "peak_bytes" of a device, and "kind": "fitted" if a count of `temporaries.py` was chosen by
        the row, "seen" if it was known when counts were chosen, or "held out".
      load: Function of the name of a config and of its overrides (dotted keys).

    Returns:
      For each row "row", "planned" and "reported" in GiB, "error" as a share of the reported one,
      "kind", and "largest", the largest item.
    """
    found = []
    for row in json.loads(file.read_text())["rows"]:
        planned = device_memory(load(row["config"], row["overrides"]))
        found.append(
            {
                "row": row["name"],
                "planned": planned.peak / GIB,
                "reported": row["peak_bytes"] / GIB,
                "error": planned.peak / row["peak_bytes"] - 1,
                "kind": row["kind"],
                "largest": planned.largest,
            }
        )
    return found
