"""Time of one MoE layer on one device, by recipe in turns, beside the estimate of `aot.cost_model`.

On a GPU: a layer of V3 with 4096 tokens and eight experts that every token uses, which have as many
rows as a GPU of an expert-parallel group under a balanced router. On a CPU: the widths of the
config. Forward and backward, without communication.

    fp8, bfloat16                      with the kernels that passed their check
    fp8 portable, bfloat16 portable    without: `precision.kernels=portable`, the layer as it was
                                       before it had kernels for FP8 and attention

A CPU has no kernels, and so only the portable rows. With `out`, the times are also written to a
file (`measured_rates.py`), with those of the pieces of a layer: its products, quantisers and
attention, each alone. Those that the file has already, as after `bench kernels`, stay.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.aot import compiled, cost_model, layer
from deepseek_jax.aot.compiled import Program
from deepseek_jax.bench import kernel_case, kernels, measured_rates, v3_sizes
from deepseek_jax.bench.grouped import known_chip, seconds_of
from deepseek_jax.bench.measured_rates import MeasuredRate, RateFile
from deepseek_jax.config import Config
from deepseek_jax.hardware import xla_options
from deepseek_jax.kernels.matmul_tiling import H100_SMS
from deepseek_jax.model import execution, params
from deepseek_jax.model.kernel_choice import PORTABLE
from deepseek_jax.model.mla import LatentAttention, attend
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.precision import weight_gradients
from deepseek_jax.precision.fp8_hopper import HopperProducts
from deepseek_jax.precision.fp8_tiles import E4M3

EXPERTS = 8
POLICIES = ("report", "full")
BUDGET = 240.0  # seconds
GOAL = 0.5  # most time of the layer in FP8, of that in the portable form
# Name of a row -> recipe and `precision.kernels`.
RECIPES = {
    f"{recipe}{' portable' * (kernels == PORTABLE)}": (recipe, kernels)
    for kernels in ("auto", PORTABLE)
    for recipe in ("fp8", "bfloat16")
}


def measure(
    config: Config,
    *,
    calls: int = 3,
    repeats: int = 5,
    wide: bool | None = None,
    say: Callable[[str], None] = print,
    budget: float | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measures the table `layer`: the layer under each recompute policy, and attention alone.

    `predicted` is the estimate of `aot.cost_model` for the compiled program, and `of_predicted` the
    measured time divided by it. `of_portable` is the time divided by that of the same recipe
    without kernels, and `of_bfloat16` by that of BF16 with kernels. `tflops_per_s` counts all GEMMs
    of the program, recomputed ones included.

    Args:
      config: Layout and sizes; its recipe is not used.
      calls: Runs that are timed together, to exclude the latency of a launch.
      repeats: Number of turns, of whose times the median is reported.
      wide: True for V3's widths; None for these on a GPU only.
      say: Prints a line.
      budget: Seconds after which no row begins; None for `BUDGET`.
      out: File of measured rates; None for none.
    """
    device, begin = jax.devices()[0], time.monotonic()
    on_gpu = device.platform == "gpu"
    small = sized(config, wide=on_gpu if wide is None else wide)
    rates = None if out is None else RateFile(out, device.device_kind)
    names = list(RECIPES) if on_gpu else [name for name in RECIPES if PORTABLE in name]
    found: dict[str, Any] = {"device": device.device_kind, **_choice(small, names[0])}
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []

    def late() -> bool:
        return time.monotonic() - begin > (BUDGET if budget is None else budget)

    for piece, lower in pieces(small).items():
        if late():
            left_out.append(piece)
            continue
        made, programs = _measured(piece, lower, small, names, calls, repeats)
        for row in made:
            say(_line(row))
        rows += made
        if rates is not None:
            tokens = small.batch.micro_sequences * small.batch.length
            rates.add(_rates(made, programs, (tokens, small.model.d_model)))
    if rates is not None and on_gpu:
        refused = found.get("kernels_refused", {})
        left_out += _measure_pieces(small, rates, refused, late, say)
    if left_out:
        say(f"no time was left for: {'; '.join(left_out)}")
    chip = known_chip(device.device_kind)
    ours = next((row["of_portable"] for row in rows if row["recipe"] == "fp8"), None)
    return {
        **found,
        "peak_tflops_per_s": None if chip is None else chip.peak_flops_per_s["bfloat16"] / 1e12,
        "assumed_tflops_per_s": cost_model.Rates().flops / 1e12,
        "fp8_layer_of_portable": ours,
        "fp8_layer_of_portable_at_most": GOAL,
        "fp8_goal_reached": None if ours is None else ours <= GOAL,
        "layer": rows,
        "left_out": left_out,
    }


def sized(config: Config, *, wide: bool) -> Config:
    """Config for one device, where every token uses all experts."""
    model = dataclasses.replace(
        config.model,
        **(v3_sizes.LAYER if wide else {}),
        experts=EXPERTS,
        top_k=EXPERTS,
        groups=1,
        top_groups=1,
    )
    batch = dataclasses.replace(
        config.batch, length=v3_sizes.LENGTH if wide else config.batch.length, micro_sequences=1
    )
    return dataclasses.replace(
        config,
        model=model,
        batch=batch,
        mesh=dataclasses.replace(config.mesh, pipe=1, replica=1, node=1, gpu=1, tensor=1),
        layout=dataclasses.replace(config.layout, zero=0, micro_batches_in_flight=1),
    )


def of_recipe(config: Config, name: str) -> Config:
    """The config with a recipe of `RECIPES`."""
    recipe, kernels = RECIPES[name]
    precision = dataclasses.replace(config.precision, recipe=recipe, kernels=kernels)
    return dataclasses.replace(config, precision=precision)


def pieces(config: Config) -> dict[str, Callable[[Config], jax.stages.Lowered]]:
    """Programs to measure, by name: functions of a config with a recipe."""

    def whole(policy: str, config: Config) -> jax.stages.Lowered:
        layout = dataclasses.replace(config.layout, recompute=policy)
        each = dataclasses.replace(config, layout=layout)
        return layer.lower(each, meshes.build(each.mesh))

    found = {f"MoE layer, recompute {each}": functools.partial(whole, each) for each in POLICIES}
    first, *rest = found
    return {first: found[first], "attention sublayer": _attention, **{k: found[k] for k in rest}}


def _choice(config: Config, name: str) -> dict[str, Any]:
    """Kernels that the FP8 rows compute with, and reasons of those that are refused."""
    return execution.kernels_of(of_recipe(config, name).precision).summary()


def _attention(config: Config) -> jax.stages.Lowered:
    """Lowers the gradient of attention with its norm and residual."""
    model, how = config.model, execution.of(config)

    def both(key: jax.Array) -> Any:
        rngs = nnx.Rngs(params=key)
        return RMSNorm(model.d_model, eps=model.norm_eps), LatentAttention(model, rngs=rngs)

    graph, weights, rest = params.split(jax.eval_shape(both, jax.random.key(0)))
    weights = jax.eval_shape(lambda tree: params.prepare(tree, how.recipe), weights)

    def gradients(weights, rest, x):
        def total(weights, x):
            norm, attention = nnx.merge(graph, weights, rest)
            return (attend(norm, attention, x, how).astype("float32") ** 2).sum()

        squares, pull = weight_gradients.vjp(total, weights, x)
        return pull(jnp.ones_like(squares))

    shape = config.batch.micro_sequences, config.batch.length, model.d_model
    x = jax.ShapeDtypeStruct(shape, how.recipe.activation_dtype)
    return jax.jit(gradients).lower(weights, rest, x)


def _measured(
    piece: str,
    lower: Callable[[Config], jax.stages.Lowered],
    config: Config,
    names: list[str],
    calls: int,
    repeats: int,
) -> tuple[list[dict[str, Any]], list[Program]]:
    """Rows of a piece, a recipe each, measured in turns; and their programs."""
    mesh = meshes.build(config.mesh)
    lowered = [lower(of_recipe(config, name)) for name in names]
    options = xla_options.options(jax.default_backend())
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda each: each.compile(options), lowered))
    programs = [compiled.read(run, mesh, layer.KERNELS) for run in runs]
    steps = [functools.partial(run, *_drawn(each)) for run, each in zip(runs, lowered, strict=True)]
    for step in steps:
        jax.block_until_ready(step())
    taken = [[seconds_of(step, calls) for step in steps] for _ in range(repeats)]
    spent = dict(zip(names, np.median(taken, axis=0).tolist(), strict=True))
    rows = [_row(piece, each, spent, made) for each, made in zip(names, programs, strict=True)]
    return rows, programs


def _row(piece: str, name: str, spent: Mapping[str, float], program: Program) -> dict[str, Any]:
    predicted = cost_model.replay(program, cost_model.costs(program, cost_model.Rates())).total
    mine, others = spent[name], (f"{name} {PORTABLE}", "bfloat16")
    portable, bfloat16 = (mine / spent[other] if other in spent else None for other in others)
    return {
        "piece": piece,
        "recipe": name,
        "milliseconds": 1e3 * mine,
        "of_portable": portable,
        "of_bfloat16": bfloat16,
        "predicted": 1e3 * predicted,
        "of_predicted": mine / predicted,
        "tflops_per_s": _flops(program) / mine / 1e12,
        "peak_GiB": program.peak_bytes / 2**30,
    }


def _flops(program: Program) -> int:
    """Operations of all GEMMs and attentions that run."""
    return round(sum(gemm.flops * gemm.times for gemm in program.gemms))


def _line(row: Mapping[str, Any]) -> str:
    """Row as a line of text."""
    ratios = [
        f"{row[key]:.2f} of {name}"
        for key, name in (("of_portable", PORTABLE), ("of_bfloat16", "bfloat16"))
        if row[key] is not None
    ]
    return (
        f"{row['piece']:28} {row['recipe']:18} {row['milliseconds']:9.2f} ms"
        f" {row['tflops_per_s']:8.1f} TFLOP/s {row['peak_GiB']:7.2f} GiB"
        f" {row['of_predicted']:7.2f} of predicted  {', '.join(ratios)}"
    )


def _rates(
    rows: list[dict[str, Any]], programs: list[Program], shape: tuple[int, ...]
) -> list[MeasuredRate]:
    """Rows of the file: tokens and model width, with the operations of all GEMMs."""
    return [
        MeasuredRate(
            row["piece"].replace(",", ""),
            row["recipe"],
            shape,
            row["milliseconds"] / 1e3,
            _flops(program),
            0,
        )
        for row, program in zip(rows, programs, strict=True)
    ]


def _measure_pieces(
    config: Config,
    rates: RateFile,
    refused: Mapping[str, str],
    late: Callable[[], bool],
    say: Callable[[str], None],
) -> list[str]:
    """Measures products, quantisers and attention alone, those that a run uses; what was left out.

    Args:
      refused: reasons of kernels that may not run.
      late: whether the time is over.
    """
    device = jax.devices()[0]
    chip = known_chip(device.device_kind)
    hopper = HopperProducts(sms=getattr(device, "core_count", None) or H100_SMS)
    model, left_out = v3_sizes.of_v3(config.model), []
    say(kernel_case.HEADER)
    for case in kernels.cases(model, v3_sizes.LENGTH, v3_sizes.GROUP, hopper):
        own = "bfloat16" if case.dtype == "bfloat16" else "fp8"
        if case.check not in kernels.IN_A_RUN or (case.piece, own, case.shape) in rates:
            continue
        if late():
            left_out.append(str(case))
            continue
        row = kernel_case.measured(case, refused, chip, rounds=3)
        say(kernel_case.line(row))
        rates.add(measured_rates.of_row(case, row))
    return left_out


def _drawn(lowered: jax.stages.Lowered) -> Any:
    """Small random arguments of a lowered program; FP8 weights have one scale."""
    leaves, tree = jax.tree.flatten_with_path(lowered.args_info[0])
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def one(path: Any, leaf: Any, key: jax.Array) -> jax.Array:
        if str(path[-1]) == ".scales":
            return jnp.full(leaf.shape, 2.0**-12, leaf.dtype)
        spread = 80.0 if leaf.dtype == E4M3 else 0.02
        return (spread * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    drawn = [one(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, drawn)
