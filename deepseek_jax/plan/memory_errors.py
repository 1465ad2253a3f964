"""Planned peak memory beside what the compiler reported, with the error of each row."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.plan.device_memory import GIB, device_memory


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
