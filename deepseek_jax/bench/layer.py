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
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

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

    mesh = meshes.build(small.mesh)
    for piece, lower in pieces(mesh).items():
        if late():
            left_out.append(piece)
            continue
        lowered = {name: lower(of_recipe(small, name)) for name in names}
        made = _measured(piece, lowered, mesh, calls, repeats)
        for row in made:
            say(_line(row))
        rows += made
        if rates is not None:
            tokens = small.batch.micro_sequences * small.batch.length
            rates.add(_rates(made, (tokens, small.model.d_model)))
    if rates is not None and on_gpu:
        refused = found.get("kernels_refused", {})
        left_out += _measure_pieces(small, rates, refused, late, say)
    if left_out:
        say(f"no time was left for: {'; '.join(left_out)}")
    chip = known_chip(device.device_kind)
    fp8 = [row for row in rows if row["recipe"] == "fp8" and row["piece"].startswith("MoE")]
    ours = fp8[0].get("of_portable") if fp8 else None  # of the first policy
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


def pieces(mesh: Mesh) -> dict[str, Callable[[Config], jax.stages.Lowered]]:
    """Programs to measure, by name: functions of a config with a recipe.

    Args:
      mesh: of one device, real or virtual.
    """

    def under(policy: str, config: Config) -> Config:
        layout = dataclasses.replace(config.layout, recompute=policy)
        return dataclasses.replace(config, layout=layout)

    def whole(policy: str, config: Config) -> jax.stages.Lowered:
        return layer.lower(under(policy, config), mesh)

    def attention(config: Config) -> jax.stages.Lowered:
        # With scores kept in memory, XLA takes minutes to compile the portable form.
        return _attention(mesh, under(POLICIES[0], config))

    found = {f"MoE layer, recompute {each}": functools.partial(whole, each) for each in POLICIES}
    first, *rest = found
    return {first: found[first], "attention sublayer": attention, **{k: found[k] for k in rest}}


def _choice(config: Config, name: str) -> dict[str, Any]:
    """Kernels that the FP8 rows compute with, and reasons of those that are refused."""
    return execution.kernels_of(of_recipe(config, name).precision).summary()


def _attention(mesh: Mesh, config: Config) -> jax.stages.Lowered:
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
            return (attend(norm, attention, x, how)[0].astype("float32") ** 2).sum()

        squares, pull = weight_gradients.vjp(total, weights, x)
        return pull(jnp.ones_like(squares))

    shape = config.batch.micro_sequences, config.batch.length, model.d_model
    x = jax.ShapeDtypeStruct(shape, how.recipe.activation_dtype)
    whole: Any = (P(),) * 3
    mapped = jax.shard_map(gradients, mesh=mesh, in_specs=whole, out_specs=P(), check_vma=False)
    with jax.set_mesh(mesh):
        return jax.jit(mapped).lower(*layer.placed(mesh, whole, (weights, rest, x)))


def _measured(
    piece: str,
    lowered: Mapping[str, jax.stages.Lowered],
    mesh: Mesh,
    calls: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Rows of a piece, a recipe each, measured in turns; one that fails has the reason."""
    steps: dict[str, Callable[[], Any]] = {}
    programs: dict[str, Program] = {}
    faults: dict[str, str] = {}
    options = xla_options.options(jax.default_backend())
    with ThreadPoolExecutor() as pool:
        runs = {name: pool.submit(each.compile, options) for name, each in lowered.items()}
    for name, run in runs.items():
        try:
            program = run.result()
            step = functools.partial(program, *_drawn(lowered[name]))
            jax.block_until_ready(step())
            steps[name], programs[name] = step, compiled.read(program, mesh, layer.KERNELS)
        except Exception as error:
            faults[name] = kernel_case.reason(error)
    taken = [[seconds_of(step, calls) for step in steps.values()] for _ in range(repeats)]
    spent = dict(zip(steps, np.median(taken, axis=0).tolist(), strict=True))
    failed = [{"piece": piece, "recipe": name, "fault": why} for name, why in faults.items()]
    return [_row(piece, name, spent, programs[name]) for name in spent] + failed


def _row(piece: str, name: str, spent: Mapping[str, float], program: Program) -> dict[str, Any]:
    predicted = cost_model.replay(program, cost_model.costs(program, cost_model.Rates())).total
    mine, others = spent[name], (f"{name} {PORTABLE}", "bfloat16")
    portable, bfloat16 = (mine / spent[other] if other in spent else None for other in others)
    flops = round(sum(gemm.flops * gemm.times for gemm in program.gemms))
    return {
        "piece": piece,
        "recipe": name,
        "milliseconds": 1e3 * mine,
        "of_portable": portable,
        "of_bfloat16": bfloat16,
        "predicted": 1e3 * predicted,
        "of_predicted": mine / predicted,
        "tflops_per_s": flops / mine / 1e12,
        "gemm_flops": flops,
        "peak_GiB": program.peak_bytes / 2**30,
    }


def _line(row: Mapping[str, Any]) -> str:
    """Row as a line of text."""
    begin = f"{row['piece']:28} {row['recipe']:18}"
    if "fault" in row:
        return f"{begin} {row['fault']}"
    ratios = [
        f"{row[key]:.2f} of {name}"
        for key, name in (("of_portable", PORTABLE), ("of_bfloat16", "bfloat16"))
        if row[key] is not None
    ]
    return (
        f"{begin} {row['milliseconds']:9.2f} ms {row['tflops_per_s']:8.1f} TFLOP/s"
        f" {row['peak_GiB']:7.2f} GiB {row['of_predicted']:7.2f} of predicted"
        f"  {', '.join(ratios)}".rstrip()
    )


def _rates(rows: list[dict[str, Any]], shape: tuple[int, ...]) -> list[MeasuredRate]:
    """Rows of the file: tokens and model width, with the operations of all GEMMs."""
    return [
        MeasuredRate(
            piece=row["piece"].replace(",", ""),
            recipe=row["recipe"],
            shape=shape,
            seconds=row["milliseconds"] / 1e3,
            flops=row["gemm_flops"],
            bytes=0,
        )
        for row in rows
        if "fault" not in row
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
