"""Two pictures of a run, from what it wrote: the losses, and each layer's expert load over time."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.train.report import METRICS, SUMMARY, Row, read_metrics

INK, MAIN, SECOND, MUTED = "#1f2933", "#1f5fa8", "#d9772b", "#7b8794"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 130,
}


def draw(workdir: Path) -> list[Path]:
    """Draws `loss.png` and `expert_load.png` into `workdir` from its `metrics.jsonl`.

    Returns:
      What was drawn: nothing without a logged step, no expert load without one that has it.
    """
    import matplotlib

    rows = read_metrics(Path(workdir) / METRICS)
    drawn = []
    with matplotlib.rc_context(STYLE):
        if rows:
            drawn.append(_save(_losses(rows, _held_out(workdir)), Path(workdir) / "loss.png"))
        if routed := [row for row in rows if _is_routed(row)]:
            figure = _expert_load(routed, _layer_names(workdir, len(routed[-1]["expert_load"])))
            drawn.append(_save(figure, Path(workdir) / "expert_load.png"))
    return drawn


def _losses(rows: list[Row], held_out: dict[str, Any]) -> Any:
    """Loss and MTP loss over tokens; the learning rate below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6))
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    tokens = _column(rows, "tokens")
    marker = "o" if len(rows) < 3 else ""
    for key, name, color in (("loss", "next token", MAIN), ("mtp_loss", "MTP", SECOND)):
        if np.isfinite(values := _column(rows, key)).any():
            last = values[np.isfinite(values)][-1]
            loss.plot(tokens, values, color=color, marker=marker, label=f"{name} ({last:.3f})")
    if (score := held_out.get("held_out_loss")) is not None:
        label = f"held-out ({score:.3f})"
        loss.axhline(score, color=INK, linestyle="--", linewidth=1, label=label)
    loss.set_ylabel("loss, nats per token")
    loss.set_title(_title(held_out), loc="left")
    loss.grid(axis="y", alpha=0.25)
    if loss.get_legend_handles_labels()[0]:
        loss.legend(loc="upper right")
    rate.plot(tokens, _column(rows, "learning_rate"), color=MUTED, marker=marker)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.locator_params(axis="y", nbins=4)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.grid(axis="y", alpha=0.25)
    _token_axis(rate)
    return figure


def _title(held_out: dict[str, Any]) -> str:
    ours, gzip = held_out.get("held_out_bits_per_byte"), held_out.get("gzip_bits_per_byte")
    if ours is None or gzip is None:
        return "Training loss"
    return f"Training loss; held-out text {ours:.2f} bits per byte (gzip -9: {gzip:.2f})"


def _expert_load(rows: list[Row], names: list[str]) -> Any:
    """One panel per MoE layer: each expert's load as a multiple of the mean, and MaxVio below."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tokens = _column(rows, "tokens")
    first = tokens[1] - tokens[0] if len(tokens) > 1 else tokens[0]
    edges = np.concatenate([[max(tokens[0] - first, 0.0)], tokens])  # a row lasts since the last
    load = np.array([row["expert_load"] for row in rows], dtype=float)  # TLE
    load = load / load.mean(axis=-1, keepdims=True)  # 1 is balanced
    layers, experts = load.shape[1:]
    across = layers if layers <= 4 else math.ceil(math.sqrt(layers))
    down = math.ceil(layers / across)
    figure = Figure(figsize=(1.2 + 3.9 * across, 0.5 + 3.3 * down))
    grid = figure.add_gridspec(2 * down, across, height_ratios=(2.6, 1) * down)
    span = 2.0 ** math.ceil(max(1.0, min(3.0, math.log2(np.quantile(load, 0.995)))))
    ceiling = load.max() - 1
    panels = []
    for layer, name in enumerate(names):
        row, column = divmod(layer, across)
        heat = figure.add_subplot(grid[2 * row, column])
        below = figure.add_subplot(grid[2 * row + 1, column], sharex=heat)
        image = heat.pcolormesh(
            edges, np.arange(experts + 1) - 0.5, np.maximum(load[:, layer].T, 1 / span),
            norm=LogNorm(1 / span, span), cmap="RdBu_r", rasterized=True,
        )  # fmt: skip
        worst = load[:, layer].max(-1) - 1
        heat.set_title(f"{name}: MaxVio {worst[-1]:.2f} at the end", loc="left", fontsize=10)
        heat.tick_params(labelbottom=False)
        heat.yaxis.set_major_locator(MaxNLocator(integer=True))
        below.plot(tokens, worst, color=MAIN, linewidth=1.2, marker="o" if len(rows) < 3 else "")
        below.set_ylim(0, ceiling * 1.08 or 1)
        below.grid(axis="y", alpha=0.25)
        if column == 0:
            heat.set_ylabel("expert")
            below.set_ylabel("MaxVio")
        if layer + across >= layers:
            _token_axis(below)
        else:
            below.tick_params(labelbottom=False)
        panels.append(heat)
    bar = figure.colorbar(
        image, ax=panels, extend="both", extendfrac=0.03, aspect=16 * down, pad=0.02
    )
    bar.set_label("load, as a multiple of the mean")
    powers = range(round(-math.log2(span)), round(math.log2(span)) + 1)
    bar.set_ticks([2.0**p for p in powers], labels=[_multiple(p, experts) for p in powers])
    bar.minorticks_off()
    figure.suptitle("Expert load over the run", x=0.01, ha="left", color=INK)
    return figure


def _is_routed(row: Row) -> bool:
    """Whether the row has a load for every expert; one whose numbers are not finite has none."""
    layers = row.get("expert_load") or []
    return bool(layers) and all(x is not None for layer in layers for x in layer)


def _multiple(power: int, experts: int) -> str:
    if power == 0:
        return f"1 = balanced\n(1/{experts} of all)"
    return str(2**power) if power > 0 else f"1/{2**-power}"


def _column(rows: list[Row], key: str) -> np.ndarray:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)


def _token_axis(axes: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.01)


def _held_out(workdir: Path) -> dict[str, Any]:
    """What `Report.finish` kept; nothing while the run has not ended."""
    return _json(Path(workdir) / SUMMARY)


def _layer_names(workdir: Path, layers: int) -> list[str]:
    """Layers as the report counts them, from 1; those past the main model's are MTP modules."""
    model = _json(Path(workdir) / "config.json").get("model", {})
    first, last = model.get("dense_layers", 0), model.get("layers", layers)
    numbers = range(first + 1, first + 1 + layers)
    return [f"layer {n}" if n <= last else f"MTP module {n - last}" for n in numbers]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    return path
