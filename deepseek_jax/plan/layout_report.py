"""Cost of a config: parameters, operations, cache and memory, as a dictionary and as text."""

import dataclasses
import io
import itertools
import math
from typing import Any

from deepseek_jax.config import MESH_AXES, Config, check, layers_per_stage
from deepseek_jax.model.count import count
from deepseek_jax.model.flops import training_flops_per_token
from deepseek_jax.parallel import mesh
from deepseek_jax.parallel.pipeline import stage_assignment
from deepseek_jax.plan.compare_schedules import TITLES
from deepseek_jax.plan.kv_cache import cache_bytes_per_token
from deepseek_jax.plan.memory import memory

GIB = 2**30

_ROWS = (
    ("masters", "masters, float32"),
    ("router_bias", "router biases"),
    ("moments", "the optimizer's moments"),
    ("counters", "counters"),
    ("state", "= state between steps"),
    ("compute_weights", "weights for compute"),
    ("gathered_layer", "one layer, gathered"),
    ("gradients", "gradient sums, float32"),
    ("reduced_gradients", "reduced gradients, float32"),
    ("total", "= total, no activations"),
    ("ema_host", "EMA, in host memory"),
)


def resolved(config: Config, devices: int | None = None) -> Config:
    """The config with the sizes of a mesh axis of -1.

    Args:
      config: Config of the run.
      devices: Number of devices; None: 1. Must equal the product of a mesh without -1.

    Raises:
      ConfigError: A mesh that does not fit `devices`, or sizes that do not fit the mesh.
    """
    sizes = [getattr(config.mesh, axis) for axis in MESH_AXES]
    if -1 in sizes or devices is not None:
        config = dataclasses.replace(config, mesh=mesh.resolve(config.mesh, devices or 1))
        check(config)
    return config


def plan(config: Config, devices: int | None = None) -> dict[str, Any]:
    """Computes the cost of a config without running it.

    Args:
      config: Config of the run.
      devices: As in `resolved`.

    Returns:
      Dictionary with stable keys; bytes and counts are integers.

    Raises:
      ConfigError: As `resolved`.
    """
    config = resolved(config, devices)
    model, length = config.model, config.batch.length
    counted, cache, used = count(model), cache_bytes_per_token(model), memory(config)
    causal, full = (training_flops_per_token(model, length, causal=c) for c in (True, False))
    return {
        "parameters": {
            "total": counted.total,
            "activated": counted.activated,
            "activated_without_input_table": counted.activated - counted.input_table,
            "mtp": counted.mtp,
        },
        "flops_per_token": {
            "length": length,
            "training_causal": causal,
            "training_full": full,
            "forward_causal": causal / 3,
        },
        "cache_bytes_per_token": dataclasses.asdict(cache),
        "layout": {
            "devices": math.prod(getattr(config.mesh, axis) for axis in MESH_AXES),
            "mesh": dataclasses.asdict(config.mesh),
            "zero": config.layout.zero,
            "recipe": config.precision.recipe,
            "moments": config.optimizer.moments,
            **_pipeline(config),
        },
        "bytes_per_device": {
            **dataclasses.asdict(used),
            "state": used.state,
            "total": used.total,
        },
    }


def _pipeline(config: Config) -> dict[str, Any]:
    """Layers of each stage; a single stage without a pipeline."""
    layers, layout = config.model.layers, config.layout
    if config.mesh.pipe == 1:
        return {"pipeline": None, "stage_layers": [layers], "empty_slots": 0}
    held = stage_assignment.stage_map(config)
    each = layers_per_stage(layers, held.stages, layout.stage_layers)
    return {
        "pipeline": layout.pipeline,
        "stage_layers": list(each),
        "empty_slots": held.stages * max(each) - layers,
    }


def text(planned: dict[str, Any]) -> str:
    """Text of a plan: one table, and notes on what is counted."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_column()
    sections = (_parameters, _flops, _cache, _memory)
    for title, rows in (section(planned) for section in sections):
        table.add_row(f"[bold]{title}", "", "")
        for name, value, note in rows:
            table.add_row(f"  {name}", value, note)
        table.add_section()
    out = io.StringIO()
    console = Console(file=out, width=100)
    console.print(table)
    console.print("\n".join(_notes(planned)), highlight=False)
    return out.getvalue().rstrip()


Section = tuple[str, list[tuple[str, str, str]]]


def _parameters(planned: dict[str, Any]) -> Section:
    names = ("total", "activated", "activated_without_input_table", "mtp")
    shown = ("total", "activated per token", "without the input table", "MTP modules' own")
    counts = planned["parameters"]
    rows = [
        (s, f"{counts[n]:,}", f"{counts[n] / 1e9:.3f} B") for n, s in zip(names, shown, strict=True)
    ]
    return "parameters", rows


def _flops(planned: dict[str, Any]) -> Section:
    flops = planned["flops_per_token"]
    rows = [
        (name, f"{flops[key] / 1e9:,.3f} GFLOP", note)
        for name, key, note in (
            ("training", "training_causal", "causal half of the scores"),
            ("training", "training_full", "all scores"),
            ("forward", "forward_causal", "causal half of the scores"),
        )
    ]
    return f"operations per token at {flops['length']} tokens", rows


def _cache(planned: dict[str, Any]) -> Section:
    cache = planned["cache_bytes_per_token"]
    rows = [
        (name, f"{cache[key]:,} B", f"MLA needs {cache['mla'] / cache[key]:.1%} of it")
        for name, key in (("plain MHA", "mha"), (f"GQA, {cache['gqa_heads']} key heads", "gqa"))
    ]
    return "cache per token, bfloat16", [("MLA, this model", f"{cache['mla']:,} B", ""), *rows]


def _memory(planned: dict[str, Any]) -> Section:
    layout, each = planned["layout"], planned["bytes_per_device"]
    rows = [(name, f"{each[key]:,} B", f"{each[key] / GIB:.2f} GiB") for key, name in _ROWS]
    return f"per device of {layout['devices']}, ZeRO {layout['zero']}", rows


def _notes(planned: dict[str, Any]) -> list[str]:
    layout = planned["layout"]
    axes = " x ".join(f"{axis} {size}" for axis, size in layout["mesh"].items() if size > 1)
    notes = [f"Mesh: {axes}."] if axes else []
    notes += ["Operations do not include MTP, recomputation and routing."]
    notes += ["Gradient sums: over micro-batches, in the layout of compute. Reduced gradients: in"]
    notes += ["the layout of the masters. Temporaries and activations are not counted."]
    return [*notes, *_stages(layout)] if layout["pipeline"] else notes


def _stages(layout: dict[str, Any]) -> list[str]:
    layers, empty = layout["stage_layers"], layout["empty_slots"]
    runs = [(each, len(list(run))) for each, run in itertools.groupby(layers)]
    (each, count), *more = runs
    shown = [f"{count} x {each} layers", *(f"{count} x {each}" for each, count in more)]
    total = len(layers) * max(layers)
    holds = "one" if layout["pipeline"] == "1f1b" else "two"
    return [
        f"Stages: {', '.join(shown)}; {TITLES[layout['pipeline']]}: each rank holds {holds}.",
        f"{empty} of {total} layer slots are empty; each costs weights and gradients of an MoE "
        "layer.",
    ]
