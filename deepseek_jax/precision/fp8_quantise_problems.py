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

from deepseek_jax.precision import fp8_tiles
from deepseek_jax.precision.fp8_hopper_quantise import HopperQuantiser
from deepseek_jax.precision.fp8_sources import FromKept, FromSwiGLU, Plain, TileSource
from deepseek_jax.precision.fp8_tiles import Tiles
from deepseek_jax.precision.fp8_weights import Fp8Weight, Linear, quantise_blocks
from deepseek_jax.precision.token_tiles import TokenTiles, quantise_tokens

ROWS, COLUMNS = 100, 72
SIZES = (70, 128)  # rows of experts: the second one's tile has rows of all parts that it loads
MOST = 203  # rows of experts, and of nobody; a third tile has none
LINEAR = Linear.whole("-io", (2, COLUMNS, ROWS))


@dataclasses.dataclass(frozen=True)
class QuantiserProblem:
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


def problems(quantiser: HopperQuantiser) -> list[QuantiserProblem]:
    """A problem for each quantiser that a recipe uses, without infinities and NaN."""
    x, of_experts = Plain(_hard(ROWS, COLUMNS, 0)), Plain(_hard(MOST, COLUMNS, 4))
    sizes = np.asarray(SIZES, np.int32)
    gate_up = (256.0 * _gate_up(ROWS, COLUMNS)).astype(jnp.bfloat16)
    kept = FromKept(_kept(_gate_up(MOST, COLUMNS // 2), -40, 40))
    return [
        QuantiserProblem("x, rows", (x,), quantiser.rows, _rows),
        QuantiserProblem("x, tokens", (x,), quantiser.tokens, _tokens),
        QuantiserProblem("x, rows and tokens", (x,), quantiser.both, _both),
        QuantiserProblem(
            "x, tokens of experts", (of_experts, sizes), quantiser.tokens_of_experts, _tokens
        ),
        QuantiserProblem(
            "SwiGLU, rows", (FromSwiGLU(gate_up, _powers(ROWS)),), quantiser.rows, _rows
        ),
        QuantiserProblem("kept, tokens", (kept,), quantiser.tokens, _tokens),
        QuantiserProblem(
            "kept, tokens of experts", (kept, sizes), quantiser.tokens_of_experts, _tokens
        ),
        QuantiserProblem(
            "weights", (_weights(),), lambda weights: quantiser.blocks(weights, LINEAR), _blocks
        ),
    ]


def further_problems(quantiser: HopperQuantiser) -> list[QuantiserProblem]:
    """Problems for the quantisers that no recipe uses: of weights, with a transposed copy."""

    def with_copy(weights: jax.Array) -> Any:
        made = _blocks(weights)
        return made, made.values.mT

    return [
        QuantiserProblem(
            "weights and a transposed copy",
            (_weights(),),
            lambda weights: quantiser.blocks_and_copy(weights, LINEAR),
            with_copy,
        ),
    ]


def _rows(source: TileSource) -> Tiles:
    return fp8_tiles.quantise_tiles(source.portable(), power_of_two=True)


def _tokens(source: TileSource, sizes: jax.Array | None = None) -> TokenTiles:
    return quantise_tokens(source.portable(), sizes, True)


def _both(source: TileSource) -> tuple[Tiles, TokenTiles]:
    return _rows(source), _tokens(source)


def _blocks(weights: jax.Array) -> Fp8Weight:
    return quantise_blocks(weights, LINEAR, power_of_two=True)


def _weights() -> Any:
    return np.stack([_hard(COLUMNS, ROWS, seed).astype(np.float32) for seed in (2, 3)])


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
