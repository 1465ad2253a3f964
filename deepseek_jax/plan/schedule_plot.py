"""Plot of a pipeline schedule."""

from pathlib import Path
from typing import Any

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.pipeline.schedule import Schedule, Work
from deepseek_jax.parallel.pipeline.timeline import Timeline, simulate
from deepseek_jax.plan.compare_schedules import (
    IDLE,
    INCHES_PER_UNIT,
    INK,
    ROW_INCHES,
    TITLES,
    WIDEST,
)

# Name of each kind of work, and its colours for stream 0 and 1: hues of the report's figure 5.
LOOKS = {
    Work.FORWARD: ("forward", "#c4730c", "#f4c987"),
    Work.BACKWARD: ("full backward", "#1f6f54", "#8cc7ae"),
    Work.INPUT_GRAD: ("input gradient", "#1f5fa8", "#94bce6"),
    Work.WEIGHT_GRAD: ("weight gradient", "#6b4f9e", "#c3b2e0"),
}

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 130,
}


def draw(schedule: Schedule, path: Path) -> Path:
    """Draws a schedule at times F = I = W = 1 and F&B = 3, with a row for each rank.

    A forward and a backward that overlap share a frame, one above the other. Stream 1 is lighter.

    Returns:
      Path of the file: `path`, with ".png" added if it has no ending.

    Raises:
      ConfigError: No such folder, or an ending that is no image format.
    """
    if path.is_dir():
        raise ConfigError(f"--picture={path} is a folder; name a file, such as schedule.png")
    path = path if path.suffix else path.with_suffix(".png")
    import matplotlib
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    timeline = simulate(schedule)
    width = min(max(INCHES_PER_UNIT * timeline.makespan, 8.0), WIDEST)
    height = ROW_INCHES * schedule.ranks
    scale = 72 * width / timeline.makespan  # points of a unit of time
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width + 1.6, height + 1.7))
        axes = figure.subplots()
        boxes, colors, frames = [], [], []
        for rank, program in enumerate(schedule.programs):
            times = zip(program, timeline.starts[rank], timeline.ends[rank], strict=True)
            for step, start, end in times:
                high = 0.86 / len(step)
                for lane, task in enumerate(step):
                    low = rank - 0.43 + lane * high
                    stream, number = schedule.stream(task)
                    boxes.append(_box(start, end, low, low + high))
                    colors.append(LOOKS[task.work][1 + stream])
                    if (size := min(8, 72 * ROW_INCHES * high * 0.66, scale * 0.72)) > 4:
                        middle = ((start + end) / 2, low + high / 2)
                        style: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
                        style |= {"color": INK if stream else "white", "fontsize": size}
                        axes.text(*middle, str(number), **style)
                if len(step) > 1:
                    frames.append(_box(start, end, rank - 0.43, rank + 0.43))
        idle = [_box(0, timeline.makespan, n - 0.43, n + 0.43) for n in range(schedule.ranks)]
        line = min(0.8, scale / 10)
        axes.add_collection(PolyCollection(idle, facecolors=IDLE))
        axes.add_collection(
            PolyCollection(boxes, facecolors=colors, edgecolors="white", linewidths=line)
        )
        axes.add_collection(
            PolyCollection(frames, facecolors="none", edgecolors=INK, linewidths=line * 1.2)
        )
        _label(axes, schedule, timeline)
        figure.suptitle(_title(schedule, timeline), x=0.01, ha="left", color=INK, fontsize=12)
        _add_legend(figure, schedule, columns=6 if width > 12 else 3)
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--picture={path}: {str(error).splitlines()[0]}") from error
    return path


def _box(start: float, end: float, low: float, high: float) -> list[tuple[float, float]]:
    return [(start, low), (end, low), (end, high), (start, high)]


def _title(schedule: Schedule, timeline: Timeline) -> str:
    bubble, peak = max(timeline.bubbles), max(timeline.peaks)
    return (
        f"{TITLES[schedule.kind]}: {schedule.ranks} ranks, {schedule.micro_batches} micro-batches; "
        f"a rank idles {bubble:g} of {timeline.makespan:g} and holds up to {peak} live chunks"
    )


def _label(axes: Any, schedule: Schedule, timeline: Timeline) -> None:
    names = []
    for rank in range(schedule.ranks):
        places = ((s, m) for s in range(schedule.stages) for m in (0, schedule.micro_batches - 1))
        held = sorted({stage for stage, micro in places if schedule.owner(stage, micro) == rank})
        stages = f"stage {held[0]}" if len(held) == 1 else f"stages {', '.join(map(str, held))}"
        names.append(f"rank {rank}: {stages}")
    axes.set_yticks(range(schedule.ranks), labels=names)
    axes.set_ylim(schedule.ranks - 0.5, -0.5)
    axes.set_xlim(0, timeline.makespan)
    axes.set_xlabel("time, in forwards of one stage (F = I = W = 1, B = 2, F&B = 3, messages free)")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _add_legend(figure: Any, schedule: Schedule, columns: int) -> None:
    """Adds a swatch per kind of work, dark and light, and one for the overlapping pair."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    steps = {tuple(task.work for task in step) for program in schedule.programs for step in program}
    streams = 1 if schedule.kind in ("1f1b", "zb1p") else 2
    swatches: list[Any] = []
    names = []
    for work, (name, *colors) in LOOKS.items():
        if (work,) in steps:
            swatches.append(tuple(Patch(color=color) for color in colors[:streams]))
            names.append(f"{name}, {work.value}")
    handlers: dict[Any, Any] = {tuple: HandlerTuple(ndivide=None, pad=0)}
    if streams == 2:
        pair = Patch(edgecolor=INK, facecolor=LOOKS[Work.FORWARD][1])
        handlers[pair] = _pair_handler()
        swatches.append(pair)
        names.append("forward and backward that overlap, F&B")
    swatches.append(Patch(color=IDLE))
    names.append("idle")
    figure.legend(
        swatches, names, handler_map=handlers, loc="outside lower left", ncols=columns,
        title=_STREAMS.get(schedule.kind), alignment="left", labelcolor=INK,
        handlelength=2.4, columnspacing=1.6,
    )  # fmt: skip


_STREAMS = {
    "dualpipe": "dark: enters at rank 0; light: enters at the last rank",
    "dualpipev": "dark: down the ranks; light: back up",
}


def _pair_handler() -> Any:
    """Legend handler of the overlapping pair: half forward, half backward, in one frame."""
    from matplotlib.legend_handler import HandlerPatch
    from matplotlib.patches import Rectangle

    class Pair(HandlerPatch):
        def create_artists(
            self, legend, orig_handle, xdescent, ydescent, width, height, fontsize, trans
        ):
            low, middle = -ydescent, -ydescent + height / 2
            forward, backward = LOOKS[Work.FORWARD][1], LOOKS[Work.BACKWARD][2]
            return [
                Rectangle((-xdescent, middle), width, height / 2, color=forward, transform=trans),
                Rectangle((-xdescent, low), width, height / 2, color=backward, transform=trans),
                Rectangle((-xdescent, low), width, height, fc="none", ec=INK, transform=trans),
            ]

    return Pair()
