"""Plot of a comparison with ablations: extra time and memory of each, in bars from the base."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.config import ConfigError
from deepseek_jax.plan.ablations_text import is_compared, scaled
from deepseek_jax.plan.compare_schedules import INK
from deepseek_jax.plan.schedule_plot import STYLE

GIB = 2**30
ROW_INCHES = 0.46
HOW_TO_READ = "Each row is the same training without one idea; to the right is worse than with it"
GREY = "#7b8794"
TIME = ("#1f5fa8", "#94bce6", "#6b4f9e", "#c3b2e0")  # of each machine
FITS, TOO_MUCH = "#1f6f54", "#c4730c"


def draw(compared: dict[str, Any], title: str, path: Path) -> Path:
    """Draws `ablations.compare`: a row for each idea, without it in the place of the base.

    Left, the change of the step time on each machine; right, that of the peak memory, with a line
    where the device is full, and rows beyond it in another colour.

    Args:
      title: Name of the model and the cluster.

    Returns:
      Path of the file: `path`, with ".png" added if it has no ending.

    Raises:
      ConfigError: No such folder, or an ending that is no image format.
    """
    if path.is_dir():
        raise ConfigError(f"--picture={path} is a folder; name a file, such as compare.png")
    path = path if path.suffix else path.with_suffix(".png")
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in compared["rows"][1:] if is_compared(row)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, ROW_INCHES * len(rows) + 2.2))
        times, memories = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
        _name_rows(times, rows)
        _draw_times(times, rows, compared)
        _draw_memories(memories, rows, compared)
        for axes in (times, memories):
            axes.axvline(0, color=INK, linewidth=1)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
            axes.set_axisbelow(True)
        figure.suptitle(f"{title}\n{HOW_TO_READ}", x=0.01, ha="left", color=INK, fontsize=11)
        figure.legend(loc="outside lower left", ncols=5, labelcolor=INK)
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--picture={path}: {str(error).splitlines()[0]}") from error
    return path


def _name_rows(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the replacement of each idea in ink, and its effect below in grey."""
    axes.set_yticks(range(len(rows)), labels=[""] * len(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    style: dict[str, Any] = {"ha": "right", "xycoords": ("axes fraction", "data")}
    style |= {"textcoords": "offset points", "annotation_clip": False}
    for number, row in enumerate(rows):
        name = f"{row['answer']} → {row['instead']}"
        at = (0, number)
        axes.annotate(name, at, (-6, 1), color=INK, fontsize=10, va="bottom", **style)
        axes.annotate(row["effect"], at, (-6, -1), color=GREY, fontsize=8, va="top", **style)


def _draw_times(axes: Any, rows: Sequence[dict[str, Any]], compared: dict[str, Any]) -> None:
    chips = list(compared["machines"])
    height, base = 0.76 / len(chips), compared["rows"][0]["chips"]
    each = [row["chips"][chip]["change"] for row in rows for chip in chips]
    ends = [100 * change for change in each if change is not None]
    span = max(0.0, *ends) - min(0.0, *ends)
    for place, (chip, color) in enumerate(zip(chips, TIME, strict=False)):
        label = f"step time on {chip}"
        for number, row in enumerate(rows):
            found = row["chips"][chip]
            if found["seconds"] is None:
                continue
            middle = number + (place - (len(chips) - 1) / 2) * height
            change = 100 * found["change"]
            axes.barh(middle, change, height * 0.9, color=color, label=label)
            label = "_"  # one entry of the legend
            _write(axes, change, middle, f"{change:+.0f} %{_price(found, base[chip])}", span)
    axes.set_xlabel("change of the step time and of the price of the run, %")
    axes.set_xlim(min(0.0, *ends) - 0.3 * span, max(0.0, *ends) + 0.28 * span)


def _price(found: dict[str, Any], base: dict[str, Any]) -> str:
    """Change of the price of the run, where there is a price."""
    if found["dollars"] is None:
        return ""
    more = found["dollars"] - base["dollars"]
    return f", {'-' if more < 0 else '+'}${scaled(abs(more))}"


def _draw_memories(axes: Any, rows: Sequence[dict[str, Any]], compared: dict[str, Any]) -> None:
    """Draws the memory of a device, which is the same on all machines, and a line for each room."""
    base = compared["rows"][0]["chips"]
    chip = next(iter(compared["machines"]))
    full = {
        each: (machine["room_bytes"] - base[each]["peak_bytes"]) / GIB
        for each, machine in compared["machines"].items()
    }
    ends = [row["chips"][chip]["peak_change"] / GIB for row in rows]
    span = max(0.0, *ends, *full.values()) - min(0.0, *ends, *full.values())
    labels = {True: f"peak memory fits {chip}", False: f"peak memory does not fit {chip}"}
    for number, (row, change) in enumerate(zip(rows, ends, strict=True)):
        fits = row["chips"][chip]["fits"]
        axes.barh(number, change, 0.6, color=FITS if fits else TOO_MUCH, label=labels[fits])
        labels[fits] = "_"
        _write(axes, change, number, f"{change:+.1f}", span)
    for end in sorted(set(full.values())):
        names = " and ".join(each for each, value in full.items() if value == end)
        axes.axvline(end, color=TOO_MUCH, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"{names} full", (end, 1.0), (0, 3), xycoords=("data", "axes fraction"), ha="center",
            textcoords="offset points", color=TOO_MUCH, fontsize=9,
        )  # fmt: skip
    axes.set_xlabel("change of the peak memory of a GPU, GiB")
    axes.set_xlim(min(0.0, *ends) - 0.15 * span, max(0.0, *ends, *full.values()) + 0.15 * span)


def _write(axes: Any, end: float, row: float, text: str, span: float) -> None:
    """Writes a value beside the end of its bar, on the side away from the base."""
    side = 1 if end >= 0 else -1
    axes.text(
        end + side * 0.012 * span, row, text, color=INK, fontsize=8.5, va="center_baseline",
        ha="left" if side > 0 else "right",
    )  # fmt: skip
