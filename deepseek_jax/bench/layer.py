"""Time of one MoE layer on one device, measured beside the estimate of `aot.cost_model`.

On a GPU: a layer of V3 with 4096 tokens in bfloat16 and eight experts that every token uses, which
have as many rows as a GPU of an expert-parallel group under a balanced router. On a CPU: the widths
of the config. Forward and backward, without communication.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from deepseek_jax.aot import compiled, cost_model, layer
from deepseek_jax.bench.grouped import known_chip, seconds_of
from deepseek_jax.config import Config
from deepseek_jax.hardware import xla_options
from deepseek_jax.model import execution, params
from deepseek_jax.model.mla import LatentAttention, attend
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.parallel import mesh as meshes

WIDTHS: dict[str, Any] = dict(
    d_model=7168, heads=128, q_latent=1536, kv_latent=512, d_nope=128, d_rope=64, d_value=128,
    shared_experts=1, d_expert=2048,
)  # fmt: skip
EXPERTS, LENGTH = 8, 4096
POLICIES = ("full", "report")


def measure(
    config: Config, *, calls: int = 3, repeats: int = 5, wide: bool | None = None
) -> dict[str, Any]:
    """Measures the table `layer`: attention alone, then the layer under each recompute policy.

    `predicted` is the estimate of `aot.cost_model` for the compiled program, and `of_predicted` the
    measured time divided by it. `tflops_per_s` counts all GEMMs of the program, recomputed ones
    included.

    Args:
      config: Recipe.
      calls: Runs that are timed together, to exclude the latency of a launch.
      repeats: Number of timings, whose median is reported.
      wide: True for V3's widths; None for these on a GPU only.
    """
    device = jax.devices()[0]
    small = sized(config, wide=device.platform == "gpu" if wide is None else wide)
    rows = [_row("attention", _attention(small), small, calls, repeats)]
    for policy in POLICIES:
        each = dataclasses.replace(
            small, layout=dataclasses.replace(small.layout, recompute=policy)
        )
        lowered = layer.lower(each, meshes.build(each.mesh))
        rows.append(_row(f"layer, recompute {policy}", lowered, each, calls, repeats))
    chip = known_chip(device.device_kind)
    return {
        "device": device.device_kind,
        "peak_tflops_per_s": None if chip is None else chip.peak_flops_per_s["bfloat16"] / 1e12,
        "assumed_tflops_per_s": cost_model.Rates().flops / 1e12,
        "layer": rows,
    }


def sized(config: Config, *, wide: bool) -> Config:
    """Config with the recipe of `config` for one device, where every token uses all experts."""
    model = dataclasses.replace(
        config.model,
        **(WIDTHS if wide else {}),
        experts=EXPERTS,
        top_k=EXPERTS,
        groups=1,
        top_groups=1,
    )
    batch = dataclasses.replace(
        config.batch, length=LENGTH if wide else config.batch.length, micro_sequences=1
    )
    return dataclasses.replace(
        config,
        model=model,
        batch=batch,
        mesh=dataclasses.replace(config.mesh, pipe=1, replica=1, node=1, gpu=1, tensor=1),
        layout=dataclasses.replace(config.layout, zero=0, micro_batches_in_flight=1),
        precision=dataclasses.replace(config.precision, recipe="bfloat16"),
    )


def _attention(config: Config) -> jax.stages.Lowered:
    """Lowers the gradient of attention with its norm and residual."""
    model, how = config.model, execution.of(config)

    def both(key: jax.Array) -> Any:
        rngs = nnx.Rngs(params=key)
        return RMSNorm(model.d_model, eps=model.norm_eps), LatentAttention(model, rngs=rngs)

    graph, weights, rest = params.split(jax.eval_shape(both, jax.random.key(0)))
    weights = jax.eval_shape(lambda tree: params.prepare(tree, how.recipe), weights)

    def total(weights, rest, x):
        norm, attention = nnx.merge(graph, weights, rest)
        return (attend(norm, attention, x, how).astype("float32") ** 2).sum()

    shape = config.batch.micro_sequences, config.batch.length, model.d_model
    x = jax.ShapeDtypeStruct(shape, how.recipe.activation_dtype)
    return jax.jit(jax.grad(total, (0, 2))).lower(weights, rest, x)


def _row(name: str, lowered: jax.stages.Lowered, config: Config, calls: int, repeats: int):
    mesh = meshes.build(config.mesh)
    run = lowered.compile(xla_options.options(jax.default_backend()))
    program = compiled.read(run, mesh, layer.KERNELS)
    rates = cost_model.Rates()
    predicted = cost_model.replay(program, cost_model.costs(program, rates)).total
    step = functools.partial(run, *_drawn(lowered))
    jax.block_until_ready(step())
    spent = float(np.median([seconds_of(step, calls) for _ in range(repeats)]))
    flops = sum(gemm.flops * gemm.times for gemm in program.gemms)
    return {
        "piece": name,
        "milliseconds": 1e3 * spent,
        "predicted": 1e3 * predicted,
        "of_predicted": spent / predicted,
        "tflops_per_s": flops / spent / 1e12,
        "peak_GiB": program.peak_bytes / 2**30,
    }


def _drawn(lowered: jax.stages.Lowered) -> Any:
    """Small random arguments of a lowered program."""
    leaves, tree = jax.tree.flatten(lowered.args_info[0])
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [
        (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)
