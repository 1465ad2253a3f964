"""Picture of `bench precision`: losses of BF16 and FP8, and differences from BF16."""

from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.train.plots import INK, MAIN, MUTED, SECOND, STYLE, save

SMOOTHED = 10  # kept values, of 10 steps each, in a point of a difference
_COLOURS = (SECOND, "#6b4f9e", "#1f6f54", "#b3324a")


def draw(runs: dict[str, dict[int, dict[str, Any]]], path: Path, bounds: tuple[float, ...]) -> Path:
    """Draws the runs of each form, by seed; the first form is the one to compare with.

    Above, the losses of that form and of "fp8" for one seed. Below, the relative difference of each
    form's loss from the first form's, mean over its seeds, smoothed over `SMOOTHED` kept values.

    Args:
      runs: form -> seed -> result of `Trainer.train`.
      path: of the picture.
      bounds: differences in % at which to draw a line, above and below zero.
    """
    import matplotlib
    from matplotlib.figure import Figure

    (base, reference), *others = runs.items()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.4))
        loss, apart = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.35))
        first = min(reference)
        shown = [base] + [name for name in runs if name == "fp8"]
        for name, colour in zip(shown, (INK, SECOND), strict=False):
            found = runs[name][first]
            loss.plot(_steps(found), found["loss"], color=colour, linewidth=1, label=name)
        loss.set_ylabel("loss, nats per token")
        loss.set_title(f"Training loss, seed {first}", loc="left")
        colours = [MAIN, *_COLOURS]
        for (name, by_seed), colour in zip(others, colours, strict=False):
            lines = [difference(reference[s]["loss"], by_seed[s]["loss"]) for s in by_seed]
            steps = _steps(next(iter(by_seed.values())))
            mean = np.mean(lines, 0)
            label = f"{name} ({len(lines)} seed{'s' * (len(lines) > 1)})"
            apart.plot(steps[-len(mean) :], mean, color=colour, linewidth=1.3, label=label)
        for bound in bounds:
            for side in (-bound, bound):
                apart.axhline(side, color=MUTED, linewidth=0.8, linestyle="--")
        apart.axhline(0, color=INK, linewidth=0.8)
        apart.set_ylabel(f"loss over {base} - 1, %")
        apart.set_xlabel("steps")
        lines_at = ", ".join(f"{bound:g}" for bound in bounds)
        apart.set_title(
            f"Relative difference, mean of the last {10 * SMOOTHED} steps; lines at "
            f"{lines_at} %", loc="left",
        )  # fmt: skip
        for axes in (loss, apart):
            axes.grid(axis="y", alpha=0.25)
            axes.legend(
                loc="upper right",
                ncols=2,
                fontsize=8,
                frameon=True,
                framealpha=1,
                edgecolor="white",
            )
            axes.margins(x=0.01)
        return save(figure, path)


def difference(reference: list[float], other: list[float]) -> np.ndarray:
    """Relative difference in % of the means of `SMOOTHED` values that end at each value."""
    window = np.ones(SMOOTHED) / SMOOTHED
    ours, theirs = (np.convolve(values, window, "valid") for values in (other, reference))
    return 100 * (ours / theirs - 1)


def _steps(found: dict[str, Any]) -> np.ndarray:
    """Step at which each kept value ends."""
    count = len(found["loss"])
    return np.arange(1, count + 1) * (found["steps"] // count)
