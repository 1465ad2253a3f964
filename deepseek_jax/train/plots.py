"""Pictures of a run from its metrics: losses, experts' load over time, GPUs' load at the end."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.data import files
from deepseek_jax.train.anomalies import ANOMALIES, read_anomalies
from deepseek_jax.train.metrics import METRICS, SUMMARY, Row, read_metrics

INK, MAIN, SECOND, MUTED = "#1f2933", "#1f5fa8", "#d9772b", "#7b8794"
ALARM = "#b3261e"
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


def load() -> None:
    """Imports matplotlib with its fonts, which `draw` would otherwise do."""
    import matplotlib.figure  # noqa: F401


def draw(workdir: Path) -> list[Path]:
    """Draws `loss.png`, `expert_load.png` and `device_load.png` into `workdir` from its metrics.

    Returns:
      Paths of the pictures: none without a logged step, no expert load without a row that has it,
      and no device load where one device has all experts.
    """
    import matplotlib

    rows = read_metrics(Path(workdir) / METRICS)
    drawn = []
    with matplotlib.rc_context(STYLE):
        if rows:
            anomalies = read_anomalies(Path(workdir) / ANOMALIES)
            figure = _losses(rows, _held_out(workdir), anomalies)
            drawn.append(save(figure, Path(workdir) / "loss.png"))
        if routed := [row for row in rows if _has_all(row, "expert_load")]:
            figure = _expert_load(routed, _layer_names(workdir, len(routed[-1]["expert_load"])))
            drawn.append(save(figure, Path(workdir) / "expert_load.png"))
        if spread := [row for row in rows if _is_spread(row)]:
            per_gpu, per_node = (np.array(spread[-1][f"tokens_per_{at}"]) for at in ("gpu", "node"))
            names, tokens = _layer_names(workdir, len(per_gpu)), _step_tokens(workdir, spread[-1])
            figure = _device_load(per_gpu, per_node, tokens, names)
            drawn.append(save(figure, Path(workdir) / "device_load.png"))
    return drawn


def _losses(rows: list[Row], held_out: dict[str, Any], anomalies: list[Row]) -> Any:
    """Figure of loss, MTP loss and anomalies over tokens, and of the learning rate below."""
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
    for row in anomalies:
        word = f"anomalies ({len(anomalies)})" if row is anomalies[0] else None
        loss.axvline(row["tokens"], color=ALARM, linestyle=":", linewidth=1.2, label=word)
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
    """Figure with a panel per MoE layer: load of each expert over the mean, and MaxVio below."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tokens = _column(rows, "tokens")
    first = tokens[1] - tokens[0] if len(tokens) > 1 else tokens[0]
    edges = np.concatenate(
        [[max(tokens[0] - first, 0.0)], tokens]
    )  # a row begins where the one before ends
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


def _device_load(per_gpu: np.ndarray, per_node: np.ndarray, tokens: float, names: list[str]) -> Any:
    """Figure of each layer's tokens on each GPU, as a multiple of their mean.

    Args:
      per_gpu, per_node: (layers, N G) and (layers, N), tokens with an expert on that GPU or node;
        GPUs are numbered node by node.
      tokens: tokens that went through each layer.
      names: names of the layers.
    """
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    load = per_gpu / per_gpu.mean(axis=-1, keepdims=True)
    layers, gpus = load.shape
    nodes = per_node.shape[-1]
    reach = next((r for r in (0.1, 0.2, 0.5) if np.abs(load - 1).max() <= r), 1.0)
    width, height = 3.0 + 0.62 * max(gpus, 6), 1.6 + 0.42 * max(layers, 2)
    figure = Figure(figsize=(min(width, 9.0), min(height, 8.6)))
    heat = figure.subplots()
    image = heat.pcolormesh(load, norm=Normalize(1 - reach, 1 + reach), cmap="RdBu_r")
    heat.invert_yaxis()
    every = math.ceil(layers / 16)
    rows = [*range(0, layers - 1 - every // 2, every), layers - 1]
    heat.set_yticks([n + 0.5 for n in rows], labels=[names[n] for n in rows])
    columns = range(0, gpus, math.ceil(gpus / 16))
    heat.set_xticks([n + 0.5 for n in columns], labels=[str(n) for n in columns])
    heat.set_xlabel("GPU")
    sides: list[Any] = [heat]
    if nodes > 1:
        edges = np.arange(nodes + 1) * gpus / nodes
        heat.vlines(edges[1:-1], 0, layers, color=INK, linewidth=min(1.6, 100 / gpus))
        sides.append(heat.secondary_xaxis("top"))
        some = range(0, nodes, math.ceil(nodes / 8))
        middles = [edges[n : n + 2].mean() for n in some]
        sides[-1].set_xticks(middles, labels=[f"node {n}" for n in some])
    for side in sides:
        side.tick_params(length=0)
        side.spines[:].set_visible(False)
    if gpus <= 16 and layers <= 16:
        for (layer, gpu), value in np.ndenumerate(load):
            color = "white" if abs(value - 1) > 0.6 * reach else INK
            heat.text(gpu + 0.5, layer + 0.5, f"{value:.2f}", color=color, ha="center", va="center")
    bar = figure.colorbar(image, ax=heat, extend="max" if load.max() > 2 else "neither", pad=0.02)
    ticks = [1 + reach * part for part in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    bar.set_ticks(ticks, labels=["1 = mean" if tick == 1 else f"{tick:g}" for tick in ticks])
    worst, gpu = np.unravel_index(load.argmax(), load.shape)
    violation = f"MaxVio {load.max() - 1:.2f} at worst ({names[worst]}, GPU {gpu})"
    copies = f"{per_gpu.sum(-1).mean() / tokens:.2f} of {gpus} GPUs"
    if nodes > 1:
        copies = f"{per_node.sum(-1).mean() / tokens:.2f} of {nodes} nodes and {copies}"
    title = f"Tokens per GPU in the last step: {violation}\na token goes to {copies}"
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)
    return figure


def _has_all(row: Row, key: str) -> bool:
    """Whether the row has lists of finite numbers under this key."""
    layers = row.get(key) or []
    return bool(layers) and all(x is not None for layer in layers for x in layer)


def _is_spread(row: Row) -> bool:
    """Whether the row has tokens of more than one GPU."""
    return _has_all(row, "tokens_per_gpu") and len(row["tokens_per_gpu"][0]) > 1


def _step_tokens(workdir: Path, row: Row) -> int:
    """Tokens of the row's own step, without those of the steps before it that were not logged."""
    return row["sequences"] * _json(Path(workdir) / "config.json")["batch"]["length"]


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
    """The summary of `Report.finish`; empty while the run has not ended."""
    return _json(Path(workdir) / SUMMARY)


def _layer_names(workdir: Path, layers: int) -> list[str]:
    """Names of the layers, counted from 1; layers after the main model's are MTP modules."""
    model = _json(Path(workdir) / "config.json").get("model", {})
    first, last = model.get("dense_layers", 0), model.get("layers", layers)
    numbers = range(first + 1, first + 1 + layers)
    return [f"layer {n}" if n <= last else f"MTP module {n - last}" for n in numbers]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def save(figure: Any, path: Path) -> Path:
    """Writes a figure, so that the file appears whole or not at all, and returns its path."""
    image = io.BytesIO()
    figure.savefig(image)
    files.replace(path, image.getvalue())
    return path
