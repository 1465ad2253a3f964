"""Problems for the FP8 kernels whose sums are exact, see `runtime/kernel_check.py`.

A linear layer of some experts, by a recipe with one kernel and by the recipe without. An expert has
no rows, and the last rows are nobody's. Values are integers from -2 to 2 times a power of two from
2^-3 to 2^3 for each tile or block, so quantising loses nothing: within a tile, sums of 128 products
take 11 bits, exact in tensor cores that keep 14; sums of tiles take 24, exact in float32. The
problems of quantisers, which take no sums, are in `fp8_quantise_problems.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.kernels.kernel_names import OUTER, PRODUCT, QUANTISE
from deepseek_jax.precision import fp8_grouped, fp8_quantise_problems, weight_gradients
from deepseek_jax.precision.expert_tiles import dequantise_rows, rows_of_tiles
from deepseek_jax.precision.fp8_form import Fp8Form
from deepseek_jax.precision.fp8_hopper import HopperProducts
from deepseek_jax.precision.fp8_hopper_quantise import HopperQuantiser
from deepseek_jax.precision.fp8_quantise_problems import QuantiserProblem
from deepseek_jax.precision.fp8_tiles import BLOCK, Tiles, dequantise_tiles
from deepseek_jax.precision.fp8_weights import Linear, quantise_blocks
from deepseek_jax.runtime.kernel_check import Check

HOPPER = 9  # major compute capability
_SMS = 3  # few, so that each thread block computes several tiles


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes of a layer: multiples of 256, which all tilings divide, and K of 128.

    Attributes:
      rows, depth, width: M, K and N.
      sizes: rows of each expert.
    """

    rows: int = 512
    depth: int = 640  # five steps, one more than a ring has slots
    width: int = 256
    sizes: tuple[int, ...] = (130, 0, 300, 61)


def checks(
    hopper: HopperProducts | None = None,
    problem: Problem | None = None,
    quantiser: HopperQuantiser | None = None,
) -> dict[str, Check]:
    """The checks by name of the kernel.

    Args:
      hopper, quantiser: kernels to check; None for those that a run uses.
      problem: sizes of a layer; None for those of a run.
    """
    hopper = hopper or HopperProducts(sms=_SMS)
    problem = problem or Problem()
    quantised = fp8_quantise_problems.problems(quantiser or HopperQuantiser())
    return {
        PRODUCT: Check(
            lambda: _products(problem, hopper, frozenset({PRODUCT})),
            lambda: _products(problem, hopper, frozenset()),
            HOPPER,
        ),
        OUTER: Check(
            lambda: _weight_gradient(problem, Fp8Form(True, frozenset({OUTER}), hopper)),
            lambda: _weight_gradient(problem, Fp8Form()),
            HOPPER,
        ),
        QUANTISE: of_quantisers(quantised),
    }


def of_quantisers(problems: Sequence[QuantiserProblem]) -> Check:
    """The check of quantisers by these problems."""
    return Check(
        lambda: [_bits(each.kernel, each.inputs) for each in problems],
        lambda: [_bits(each.portable, each.inputs) for each in problems],
        HOPPER,
    )


def _products(problem: Problem, hopper: HopperProducts, kernels: frozenset[str]) -> Any:
    """Output of the layer and gradient of its input; the output by each tiling there is."""
    tilings = [(each,) for each in hopper.tilings if hopper.pairs or not each.pair]
    x, d_out = (_by_row(problem, width, seed) for seed, width in _widths(problem))
    weight = _weight(problem)
    sizes = jnp.asarray(problem.sizes, jnp.int32)

    def layer(x: jax.Array, tiling: Any) -> jax.Array:
        form = Fp8Form(True, kernels, dataclasses.replace(hopper, tilings=tiling))
        return fp8_grouped.grouped_matmul(x, weight, sizes, likely=problem.rows, form=form)

    @jax.jit
    def run(x: jax.Array, d_out: jax.Array) -> Any:
        out, pull = jax.vjp(lambda x: layer(x, hopper.tilings), x)
        return out, pull(d_out)[0], [layer(x, each) for each in tilings if len(tilings) > 1]

    return run(x, d_out)


def _weight_gradient(problem: Problem, form: Fp8Form) -> Any:
    """Gradient of the layer's weight."""
    x, d_out = (_by_column(problem, width, seed) for seed, width in _widths(problem))
    weight = _weight(problem)
    sizes = jnp.asarray(problem.sizes, jnp.int32)

    @jax.jit
    def run(x: jax.Array, d_out: jax.Array) -> jax.Array:
        def layer(weight: Any) -> jax.Array:
            return fp8_grouped.grouped_matmul(x, weight, sizes, likely=problem.rows, form=form)

        return weight_gradients.vjp(layer, weight)[1](d_out)[0]

    return run(x, d_out)


def _bits(quantise: Callable[..., Any], inputs: tuple[Any, ...]) -> list[np.ndarray]:
    """Bits of what a quantiser makes, as integers: -0 is not 0."""
    made = jax.jit(quantise)(*jax.tree.map(jnp.asarray, inputs))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(made)]
    return [leaf.view(f"u{leaf.dtype.itemsize}") for leaf in leaves]


def _widths(problem: Problem) -> list[tuple[int, int]]:
    """Seed and width of the input, and of the gradient of the output."""
    return list(enumerate((problem.depth, problem.width), 1))


def _by_row(problem: Problem, width: int, seed: int) -> jax.Array:
    """Rows with a power of two for each tile of 128 columns."""
    values = _integers(problem.rows, width, seed=seed)
    return dequantise_tiles(
        Tiles(values, _powers(problem.rows, width // BLOCK, seed=seed)), jnp.bfloat16
    )


def _by_column(problem: Problem, width: int, seed: int) -> jax.Array:
    """Rows with a power of two for each column of each tile of 128 rows of an expert."""
    values = _integers(problem.rows, width, seed=seed)
    sizes = jnp.asarray(problem.sizes, jnp.int32)
    tiles = rows_of_tiles(problem.rows, sizes)[0].shape[0]
    made = Tiles(values, _powers(tiles, width, seed=seed))
    return dequantise_rows(made, sizes, jnp.bfloat16)


def _weight(problem: Problem) -> Any:
    """FP8 weight with a power of two for each block."""
    shape = len(problem.sizes), problem.depth, problem.width
    powers = _powers(shape[0], shape[1] // BLOCK, shape[2] // BLOCK, seed=3)
    whole = _integers(*shape, seed=3) * powers.repeat(BLOCK, 1).repeat(BLOCK, 2)
    return quantise_blocks(whole, Linear.whole("-io", shape), power_of_two=True)


def _integers(*shape: int, seed: int) -> jax.Array:
    numbers = np.random.default_rng(seed).integers(-2, 3, shape)
    return jnp.asarray(numbers, jnp.float32)


def _powers(*shape: int, seed: int) -> jax.Array:
    powers = np.random.default_rng(seed).integers(-3, 4, shape)
    return jnp.asarray(2.0**powers, jnp.float32)
