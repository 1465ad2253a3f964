"""The checks of the FP8 kernels: right kernels pass, and a scale in another place does not."""

import dataclasses
import functools
import types

import interpreted
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.kernels.kernel_names import OUTER, PRODUCT, QUANTISE
from deepseek_jax.kernels.matmul_tiling import SQUARE
from deepseek_jax.precision import fp8_checks
from deepseek_jax.precision.expert_tiles import tile_of_row
from deepseek_jax.precision.fp8_checks import Problem
from deepseek_jax.precision.fp8_hopper import HopperProducts
from deepseek_jax.precision.fp8_hopper_quantise import HopperQuantiser
from deepseek_jax.precision.fp8_tiles import Tiles, dequantise_tiles, quantise_tiles
from deepseek_jax.precision.fp8_weights import quantise_blocks
from deepseek_jax.precision.token_tiles import in_rows, quantise_tokens
from deepseek_jax.runtime.kernel_check import refused

HOPPER = types.SimpleNamespace(compute_capability="9.0")
EXACT = functools.partial(jnp.einsum, precision="highest")
SMALL = Problem(rows=256, depth=256, width=128, sizes=(130, 0, 61))


def test_right_kernels_pass():
    """In JAX's interpreter, one block of threads after another.

    `test_fp8_hopper_quantise.py` computes the problems of quantisers.
    """
    kernels = HopperProducts(sms=1, interpret=interpreted.GPU, tilings=(SQUARE,))
    checks = fp8_checks.checks(kernels, SMALL)
    assert set(checks) == {PRODUCT, OUTER, QUANTISE}
    del checks[QUANTISE]
    assert refused(checks, HOPPER) == {}


@dataclasses.dataclass(frozen=True)
class Reference(HopperProducts):
    """Products by einsum. `step` is added to the place of each scale along the summed axis."""

    step: int = 0

    def product(self, tiles, weight, sizes=None, *, dtype):
        return self._each(
            tiles, weight.dequantised(tiles.values.shape[1], jnp.float32), sizes, dtype
        )

    def input_gradient(self, tiles, weight, sizes=None, *, dtype):
        rows = weight.values.size // weight.scales.shape[0] // tiles.values.shape[1]
        return self._each(tiles, weight.dequantised(rows, jnp.float32).mT, sizes, dtype)

    def weight_gradient(self, x, d_out, sizes=None):
        rows = Problem().rows
        tile, real = tile_of_row(rows, sizes)
        x, d_out = (in_rows(tiles, rows, sizes) for tiles in (x, d_out))
        x = Tiles(x.values, jnp.roll(x.scales, self.step, 0))
        x, d_out = (
            jnp.where(real, each.values.astype(jnp.float32) * each.scales[tile], 0)
            for each in (x, d_out)
        )
        return EXACT("ME,MK,MN->EKN", _owners(sizes, len(x)), x, d_out)

    def _each(self, tiles, matrices, sizes, dtype):
        tiles = Tiles(tiles.values, jnp.roll(tiles.scales, self.step, 1))
        x = dequantise_tiles(tiles, jnp.float32)
        out = EXACT("ME,MK,EKN->MN", _owners(sizes, len(x)), x, matrices)
        return out.astype(dtype)


def _owners(sizes, rows):
    ends, number = jnp.cumsum(sizes)[None], jnp.arange(rows)[:, None]
    return ((number >= ends - sizes[None]) & (number < ends)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class ReferenceQuantiser(HopperQuantiser):
    """The portable form, of which scales of blocks are `factor` times as large."""

    factor: float = 1.0

    def rows(self, source):
        return quantise_tiles(source.portable(), power_of_two=True)

    def tokens(self, source):
        return self.tokens_of_experts(source, None)

    def both(self, source):
        return self.rows(source), self.tokens(source)

    def tokens_of_experts(self, source, sizes):
        return quantise_tokens(source.portable(), sizes, True)

    def blocks(self, weight, linear):
        made = quantise_blocks(weight, linear, power_of_two=True)
        return dataclasses.replace(made, scales=made.scales * self.factor)


@pytest.mark.parametrize("step", [0, 1])
def test_scales_that_are_one_step_off_are_noticed(step):
    """At the sizes of a run."""
    kernels = Reference(interpret="any platform", tilings=(SQUARE,), step=step)
    quantiser = ReferenceQuantiser(factor=2.0**step)
    found = refused(fp8_checks.checks(kernels, quantiser=quantiser), HOPPER)
    assert set(found) == ({PRODUCT, OUTER, QUANTISE} if step else set()), found
    for name, reason in found.items():
        wrong, _, size = reason.split()[:3]
        assert int(wrong) > (0 if name == QUANTISE else 0.3 * int(size))


def test_sums_are_exact():
    """In tensor cores that keep 14 bits within a step, and in float32 over steps."""
    problem = Problem()
    row, column = fp8_checks._by_row(problem, problem.depth, 1), fp8_checks._weight(problem)
    x = np.asarray(row, np.float64).reshape(problem.rows, -1, 128)
    w = np.asarray(column.dequantised(problem.depth, jnp.float32), np.float64)
    step = np.abs(x[x != 0]).min() * np.abs(w[w != 0]).min()
    assert np.abs(x).max() * np.abs(w).max() * problem.depth / step < 2**24
    assert (np.abs(x).max(-1) / np.where(x == 0, np.inf, np.abs(x)).min(-1)).max() <= 2
