"""Speed of the grouped matmul's kernels by tile, on this GPU.

Sizes are those of `grouped.GPU`: both matmuls of four experts of V3 under a balanced router. The
three products are forward, the gradient of the rows and the gradient of the weights.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.bench import grouped
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.kernels import grouped_triton
from deepseek_jax.kernels.grouped_triton import BFLOAT16_TILE, Tile

PRODUCTS = ("forward", "rows", "weights")


def candidates() -> tuple[Tile, ...]:
    """Tiles to measure, the one in use first."""
    sizes = ((128, 256), (256, 128), (128, 128), (64, 256))
    found = [
        Tile(*size, depth=depth, warps=warps, stages=stages)
        for size, depth, (warps, stages) in itertools.product(
            sizes, (32, 64), ((4, 4), (8, 3), (8, 4))
        )
    ]
    found += [dataclasses.replace(BFLOAT16_TILE, neighbours=number) for number in (4, 8, 32)]
    return tuple(dict.fromkeys([BFLOAT16_TILE, *found]))


def measure(
    config: Config,
    *,
    case: grouped.MatmulCase = grouped.GPU,
    tiles: Iterable[Tile] | None = None,
    rounds: int = 3,
    interpret: bool = False,
) -> dict[str, Any]:
    """Measures TFLOP/s of each product and tile, medians over rounds; 0 if it does not compile.

    Raises:
      ConfigError: No GPU, and `interpret` is False.
    """
    del config  # the benchmark has its own sizes and dtype
    device = jax.devices()[0]
    if device.platform != "gpu" and not interpret:
        raise ConfigError("bench tiles measures kernels of a GPU, and this machine has none")
    found: dict[str, Any] = {"device": device.device_kind, "dtype": case.dtype}
    for shape in case.shapes:
        key = f"{shape.rows} rows, {shape.experts} experts, {shape.width} x {shape.out}"
        found[key] = _rows(shape, case, tuple(tiles or candidates()), rounds, interpret)
    return found


def _rows(shape, case, tiles, rounds, interpret) -> list[dict[str, Any]]:
    keys = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(keys[0], (shape.rows, shape.width), case.dtype)
    weight = jax.random.normal(keys[1], (shape.experts, shape.width, shape.out), case.dtype)
    d_out = jax.random.normal(keys[2], (shape.rows, shape.out), case.dtype)
    given = rows, weight, jnp.asarray(shape.sizes()["balanced"]), d_out
    with ThreadPoolExecutor() as pool:  # compiling is most of the wait
        each = [
            pool.submit(_compiled, tile, product, given, interpret)
            for tile, product in itertools.product(tiles, PRODUCTS)
        ]
    compiled = [one.result() for one in each]
    spent = [
        [grouped.seconds_of(step, case.calls) if step else math.inf for step in compiled]
        for _ in range(rounds)
    ]
    rates = shape.flops() / np.median(spent, axis=0).reshape(len(tiles), len(PRODUCTS)) / 1e12
    return [
        {**dataclasses.asdict(tile), **dict(zip(PRODUCTS, map(float, each), strict=True))}
        for tile, each in zip(tiles, rates, strict=True)
    ]


def _compiled(tile: Tile, product: str, given: Any, interpret: bool) -> Callable[[], Any] | None:
    """Compiled product, ready to run; None for a tile that exceeds the chip's resources."""
    options: Any = {"tile": tile, "interpret": interpret}

    def run(rows, weight, sizes, d_out):
        if product == "forward":
            return grouped_triton.product(rows, weight, sizes, **options)
        if product == "rows":
            return grouped_triton.rows_gradient((rows, weight, sizes), d_out, **options)
        return grouped_triton.weight_gradient((rows, weight, sizes), d_out, **options)

    step = functools.partial(jax.jit(run), *given)
    try:
        jax.block_until_ready(step())
    except jax.errors.JaxRuntimeError:
        return None
    return step
