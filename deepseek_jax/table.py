"""Text form of results: aligned figures and tables."""

from typing import Any


def text(found: dict[str, Any]) -> str:
    """Formats single values as aligned lines, and each list of rows as a table."""
    lines = [f"{key:32}{_shown(v):>18}" for key, v in found.items() if not isinstance(v, list)]
    for key, rows in found.items():
        if isinstance(rows, list) and rows:
            cells = [list(rows[0]), *([_shown(v) for v in row.values()] for row in rows)]
            widths = [2 + max(map(len, column)) for column in zip(*cells, strict=True)]
            lines += ["", key]
            lines += ["".join(map(str.rjust, line, widths)) for line in cells]
    return "\n".join(lines).strip()


def _shown(value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
