"""Cost of one MoE layer as experts are added at a fixed top-k: it follows the activated ones.

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
    """Median seconds for each number of experts, taken in turns, and their ratio to the first."""
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
    """Runs forward and backward of one layer once and says how long it took."""
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
