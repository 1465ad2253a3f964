"""Small problems that quantisers must solve to the bit, to check them before a run trusts them.

No sum is taken, and no result depends on how a platform rounds an exponential: gates are zero, or
so large that SwiGLU is zero, or gate times up. Arrays are ragged, and have tiles of zeros, of
magnitudes near the largest and the least of bfloat16, and tiles whose largest value is 448 times a
power of two, where a scale changes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.precision import fp8_hopper_quantise, fp8_tiles, fp8_weights
from deepseek_jax.precision.fp8_hopper_quantise import HopperQuantiser
from deepseek_jax.precision.fp8_sources import (
    FromKept,
    FromKeptSwiGLU,
    FromNorm,
    FromSwiGLU,
    Plain,
    TileSource,
)
from deepseek_jax.precision.fp8_tiles import Tiles

ROWS, COLUMNS = 100, 72
SIZES = (70, 128)  # rows of experts: the second one's tile has rows of all parts that it loads
MOST = 203  # rows of experts, and of nobody; a third tile has none


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs, and two functions of them whose results must be equal to the bit.

    Attributes:
      name: of the quantiser, for messages.
      inputs: arguments, trees of NumPy arrays.
      kernel: by a kernel for Hopper.
      portable: in the portable form.
    """

    name: str
    inputs: tuple[Any, ...]
    kernel: Callable[..., Any]
    portable: Callable[..., Any]


def problems(quantiser: HopperQuantiser) -> list[Problem]:
    """A problem for each quantiser, without infinities and NaN."""
    scale = _powers(ROWS)
    gate_up = (256.0 * _gate_up(ROWS, COLUMNS)).astype(jnp.bfloat16)
    found = [
        Problem(f"{name}, rows and tokens", (source,), quantiser.both, _both)
        for name, source in (
            ("plain", Plain(_hard(ROWS, COLUMNS, 0))),
            ("SwiGLU", FromSwiGLU(gate_up, scale)),
            ("RMSNorm", FromNorm(_hard(ROWS, COLUMNS, 1, 40), scale, _powers(COLUMNS))),
        )
    ]
    kept = FromKept(_kept(_gate_up(ROWS, COLUMNS // 2), -40, 40))
    gated_kept = FromKeptSwiGLU(_kept(_gate_up(MOST, fp8_tiles.BLOCK), 7, 9), _powers(MOST))
    found += [
        Problem("kept, tokens", (kept,), quantiser.tokens, _tokens),
        Problem("SwiGLU of kept, tokens", (gated_kept,), quantiser.tokens, _tokens),
        Problem(
            "SwiGLU of kept, tokens of experts",
            (gated_kept, np.asarray(SIZES, np.int32)),
            quantiser.tokens_of_experts,
            fp8_hopper_quantise.portable_tokens_of_experts,
        ),
    ]
    linear = fp8_weights.Linear.whole("-io", (2, COLUMNS, ROWS))
    weights = np.stack([_hard(COLUMNS, ROWS, seed).astype(np.float32) for seed in (2, 3)])

    def kernel(weights: jax.Array) -> Any:
        return quantiser.blocks(weights, linear)

    def portable(weights: jax.Array) -> Any:
        made = fp8_weights.quantise_blocks(weights, linear, power_of_two=True)
        return made, made.values.mT

    return [*found, Problem("weights", (weights,), kernel, portable)]


def _tokens(source: TileSource) -> Tiles:
    return fp8_tiles.quantise_tiles(source.portable(), power_of_two=True, axis=-2)


def _both(source: TileSource) -> tuple[Tiles, Tiles]:
    return fp8_tiles.quantise_tiles(source.portable(), power_of_two=True), _tokens(source)


def _hard(rows: int, columns: int, seed: int, most: int = 120) -> Any:
    """Numbers of bfloat16 from 2^-most to 2^most."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, columns)) * 2.0 ** random.integers(-most, most, (rows, 1))
    x[::7] = 0
    x[3::9, 0] = 448 * 2.0 ** random.integers(-9, 9, len(x[3::9]))
    x[3::9, 1:] = random.integers(-448, 449, (len(x[3::9]), columns - 1))
    return x.astype(jnp.bfloat16)


def _gate_up(rows: int, columns: int) -> Any:
    """Gates from -2 to 2, then as many values from -15 to 15."""
    random = np.random.default_rng(5)
    return np.concatenate([random.integers(-n, n + 1, (rows, columns)) for n in (2, 15)], 1)


def _powers(size: int) -> Any:
    return (2.0 ** np.random.default_rng(6).integers(-3, 4, size)).astype(np.float32)


def _kept(values: np.ndarray, least: int, most: int) -> Tiles:
    """Tiles with these values, and scales from 2^least to 2^most."""
    blocks = -(-values.shape[1] // fp8_tiles.BLOCK)
    powers = np.random.default_rng(7).integers(least, most + 1, (len(values), blocks))
    arrays: Any = values.astype(fp8_tiles.E4M3), (2.0**powers).astype(np.float32)
    return Tiles(*arrays)
