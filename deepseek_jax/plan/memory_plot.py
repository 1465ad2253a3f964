"""Plot of the memory of a device: stacked items for each recipe and recompute policy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.config import ConfigError
from deepseek_jax.plan.compare_schedules import INK
from deepseek_jax.plan.device_memory import ITEMS, DeviceMemory
from deepseek_jax.plan.schedule_plot import STYLE

GIB = 2**30
ROW_INCHES = 0.42

COLOURS = dict(
    zip(
        ITEMS,
        ("#1f5fa8", "#94bce6", "#1f6f54", "#8cc7ae", "#c4730c", "#f4c987", "#6b4f9e", "#c3b2e0"),
        strict=True,
    )
)


def draw(
    memories: Mapping[str, DeviceMemory], device_bytes: int, device: str, title: str, path: Path
) -> Path:
    """Draws a bar for each memory, stacked by item, and a line at the device's memory.

    Args:
      memories: Label of a bar -> memory; from top to bottom.
      device_bytes: Memory of the device.
      device: Name of the device.
      title: Title of the figure.
      path: Path of the file.

    Returns:
      Path of the file: `path`, with ".png" added if it has no ending.

    Raises:
      ConfigError: No such folder, or an ending that is no image format.
    """
    if path.is_dir():
        raise ConfigError(f"--picture={path} is a folder; name a file, such as memory.png")
    path = path if path.suffix else path.with_suffix(".png")
    import matplotlib
    from matplotlib.figure import Figure

    labels, each = list(memories), list(memories.values())
    widest = max(device_bytes, *(memory.peak for memory in each)) / GIB
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, ROW_INCHES * len(each) + 1.9))
        axes = figure.subplots()
        left = [0.0] * len(each)
        for name in ITEMS:
            sizes = [memory.items[name] / GIB for memory in each]
            if any(sizes):
                axes.barh(labels, sizes, 0.72, left, color=COLOURS[name], label=name)
            left = [start + size for start, size in zip(left, sizes, strict=True)]
        for row, end in enumerate(left):
            style: dict[str, Any] = {"color": INK, "va": "center_baseline", "fontsize": 9}
            axes.text(end + 0.01 * widest, row, f"{end:.1f}", **style)
        axes.axvline(device_bytes / GIB, color=INK, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"{device}: {device_bytes / GIB:.1f} GiB", (device_bytes / GIB, 1.0), (3, 2),
            xycoords=("data", "axes fraction"), textcoords="offset points", color=INK, fontsize=9,
        )  # fmt: skip
        axes.set_xlim(0, 1.08 * widest)
        axes.invert_yaxis()
        axes.set_xlabel("GiB of a device at the worst moment of a step (estimated)")
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12)
        figure.legend(loc="outside lower left", ncols=4, labelcolor=INK)
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--picture={path}: {str(error).splitlines()[0]}") from error
    return path
