"""Time of one MoE layer with 16, 32 and 64 experts at a fixed top-k.

2048 tokens, width 256, experts of width 128, top-4, float32; forward and backward.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from deepseek_jax.bench.train import sized
from deepseek_jax.config import Config
from deepseek_jax.model import execution, params
from deepseek_jax.model.moe import MixtureOfExperts

EXPERTS = (16, 32, 64)


def measure(config: Config, *, rounds: int = 15) -> dict[str, list[dict[str, float]]]:
    """Measures median seconds per number of experts, in turns, and their ratio to the first."""
    runs = [_compiled(sized(config, experts=experts)) for experts in EXPERTS]
    seconds = np.array([[run() for run in runs] for _ in range(rounds)])
    medians = np.median(seconds, axis=0)
    return {
        "layers": [
            {"experts": experts, "seconds": float(median), "ratio": float(median / medians[0])}
            for experts, median in zip(EXPERTS, medians, strict=True)
        ]
    }


def _compiled(config: Config) -> Callable[[], float]:
    """Function that runs forward and backward of one layer and returns its seconds."""
    model, how = config.model, execution.of(config)
    layer: Any = MixtureOfExperts(model, rngs=nnx.Rngs(params=0))
    graph, weights, bias = params.split(layer)
    shape = (config.batch.micro_sequences, config.batch.length, model.d_model)
    x = jax.random.normal(jax.random.key(1), shape)

    def loss(weights, bias, x):
        out, _ = nnx.merge(graph, weights, bias)(x, how)
        return (out * out).mean()

    step = jax.jit(jax.grad(loss, argnums=(0, 2))).lower(weights, bias, x).compile()
    jax.block_until_ready(step(weights, bias, x))

    def run() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(step(weights, bias, x))
        return time.perf_counter() - begin

    return run
