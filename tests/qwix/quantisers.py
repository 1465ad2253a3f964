"""Our FP8 quantisers beside those of qwix (google/qwix), bit for bit.

    pip install -e ".[qwix]" && PYTHONPATH=tests:. python tests/qwix/quantisers.py

Not part of CI, where qwix is not installed. Prints a line for each comparison, and fails where one
does not come out as stated here.

Equal to the bit, with free scales and float32 arrays: values and scales of 1x128 tiles along either
axis, of 128x128 blocks and of the rows of each expert, on random, huge, mixed, NaN and infinite
tiles, with or without jit. Different:

- Least scale. A tile whose largest magnitude is below 1e-12 has the scale of 1e-12 here. In qwix it
  has its own scale down to a largest of 4.9e-17, below which the scale is 1 and all values are 0.
- Powers of two. qwix has them in `mxfp8`, for 32 values, as 2^ceil(log2(scale)) in floats. Where
  the largest is 448 2^k or next to it, log2 can round to the other side, so that the scale is twice
  ours or half of it. Ours comes from the bits of the float: the least power of two that holds it.
- Ragged tiles. qwix refuses a dimension that is no multiple of the tile; with zeros appended it
  gives our values and scales.
- Arrays of bfloat16. qwix makes the scale and divides in bfloat16: values are rounded twice.
- NaN. XLA for CPUs drops NaN from the maximum of 4,096 or more floats; in qwix the rest of a NaN's
  tile then stays finite, and the NaN itself a NaN. Ours is a maximum of integers.
"""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from hard_tiles import assert_same_bits, hard

from deepseek_jax.precision.expert_tiles import quantise_rows
from deepseek_jax.precision.fp8_tiles import BLOCK, quantise_tiles
from deepseek_jax.precision.fp8_weights import Linear, quantise_blocks

E4M3 = jnp.float8_e4m3fn
FLOOR, QWIX_FLOOR = 1e-12, 448 * float(jnp.sqrt(jnp.finfo(jnp.float32).tiny))
MX = 32  # values of a tile of mxfp8


def theirs(x: np.ndarray, tiled: dict[int, int], qtype=E4M3, jit: bool = True):
    """Values and scales of qwix, in tiles of these sizes along some axes and of 1 along others."""

    def run(x):
        rest = [axis for axis in range(x.ndim) if axis not in tiled]
        out = qwix.quantize(x, qtype, channelwise_axes=rest, tiled_axes=tiled)
        return out.qvalue, out.scale

    return jax.tree.map(np.asarray, (jax.jit(run) if jit else run)(jnp.asarray(x)))


def ours(x: np.ndarray, power_of_two: bool = False, axis: int = -1):
    tiles = jax.jit(lambda x: quantise_tiles(x, power_of_two=power_of_two, axis=axis))(x)
    return np.asarray(tiles.values), np.asarray(tiles.scales)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal float32, every row of another magnitude, from 1e-11 to the largest that we take."""
    source = np.random.default_rng(seed)
    x = source.standard_normal(shape) * 10.0 ** source.uniform(-11, 30, (*shape[:-1], 1))
    return np.append(x[:-1], np.clip(x[-1:], -1, 1) * 2.0**126, 0).astype(np.float32)


def tiles_along_either_axis() -> str:
    x = random(512, 384)
    for jit in (True, False):
        assert_same_bits(*ours(x), *theirs(x, {1: BLOCK}, jit=jit))
        assert_same_bits(*ours(x, axis=-2), *theirs(x, {0: BLOCK}, jit=jit))
    return f"{2 * x.size:,} values equal"


def hard_tiles() -> str:
    """Denormal, huge, zero and mixed tiles, without those that our least scale is for."""
    x = hard(320, 384)
    (values, scales), (their_values, their_scales) = ours(x), theirs(x, {1: BLOCK})
    tiles = x.reshape(320, 3, BLOCK)
    large = np.abs(tiles).max(-1) > FLOOR
    values, their_values = (part.reshape(tiles.shape)[large] for part in (values, their_values))
    assert_same_bits(values, scales[large], their_values, their_scales[large])
    return f"{values.size:,} values equal, of tiles whose largest is over {FLOOR}"


def blocks() -> str:
    x = random(512, 384)
    weight = quantise_blocks(jnp.asarray(x), Linear.whole("io", x.shape), power_of_two=False)
    assert_same_bits(weight.values, weight.scales, *theirs(x, {0: BLOCK, 1: BLOCK}))
    return f"{x.size:,} values equal"


def rows_of_experts() -> str:
    x, sizes = random(500, 64), np.array([256, 0, 100, 144])
    got = quantise_rows(jnp.asarray(x), jnp.asarray(sizes), False)
    start, tile = 0, 0
    for size in sizes[sizes > 0]:
        own = np.pad(x[start : start + size], ((0, -size % BLOCK), (0, 0)))
        values, scales = theirs(own, {0: BLOCK})
        part = np.asarray(got.values)[start : start + size]
        assert_same_bits(part, got.scales[tile : tile + len(scales)], values[:size], scales)
        start, tile = start + size, tile + len(scales)
    return f"{x.size:,} values equal"


def ragged() -> str:
    x = random(64, 576)
    try:
        theirs(x, {1: BLOCK})
    except ValueError as error:
        assert "cannot be tiled" in str(error)
    else:
        raise AssertionError("qwix takes ragged tiles now")
    values, scales = theirs(np.pad(x, ((0, 0), (0, -576 % BLOCK))), {1: BLOCK})
    assert_same_bits(*ours(x), values[:, :576], scales)
    return "refused; equal with zeros appended"


def not_finite() -> str:
    """Few enough values that XLA keeps the NaN in a maximum, then more."""
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((8, 256), np.float32)
        x[3, 130] = bad
        assert_same_bits(*ours(x), *theirs(x, {1: BLOCK}))
    many = np.ones((64, 256), np.float32)
    many[3, 130] = np.nan
    assert np.isnan(ours(many)[0][3, 128:].astype(np.float32)).all()
    found = np.isnan(theirs(many, {1: BLOCK})[0].astype(np.float32))
    assert found[3, 130]
    return f"equal; in a large array qwix keeps {128 - found.sum()} values beside a NaN finite here"


def zeros_and_the_least_scale() -> str:
    largest = np.float32([0, 1e-40, 1e-20, 4e-17, 6e-17, 1e-14, 9e-13, 1.1e-12, 1e-9])
    x = np.linspace(-1, 1, BLOCK, dtype=np.float32) * largest[:, None]
    (values, scales), (their_values, their_scales) = ours(x), theirs(x, {1: BLOCK})
    above = largest > FLOOR
    assert_same_bits(values[above], scales[above], their_values[above], their_scales[above])
    np.testing.assert_allclose(scales[~above], FLOOR / 448, rtol=1e-6)
    low = largest < QWIX_FLOOR
    np.testing.assert_array_equal(their_scales[low], 1)
    np.testing.assert_array_equal(their_values[low].astype(np.float32), 0)
    np.testing.assert_allclose(their_scales[~low, 0], largest[~low] / 448, rtol=1e-6)
    return f"equal above {FLOOR}; qwix has no floor, and the scale 1 below {QWIX_FLOOR:.1e}"


def powers_of_two() -> str:
    """Random tiles, then tiles whose largest is 448 2^k or the float after or before it."""
    wide = random(2000, MX, seed=1)
    edges = np.ldexp(np.float32(448), np.arange(-30, 60)).astype(np.float32)
    apart = {"at 448 2^k": edges, "after": np.nextafter(edges, np.float32(np.inf)),
             "before": np.nextafter(edges, np.float32(0))}  # fmt: skip
    told = []
    for name, x in [("random", wide), *((n, np.outer(e, np.ones(MX))) for n, e in apart.items())]:
        x = x.astype(np.float32)
        values, scales = ours(np.pad(x, ((0, 0), (0, BLOCK - MX))), power_of_two=True)
        their_values, their_scales = theirs(x, {1: MX}, "mxfp8")
        same = (scales == their_scales)[:, 0]
        assert_same_bits(values[same, :MX], scales[same], their_values[same], their_scales[same])
        assert name != "random" or same.all()
        ratios = set((their_scales / scales)[~same, 0])
        assert ratios <= {0.5, 2.0}, ratios
        least = np.abs(x).max(1).astype(np.float64) / 448
        np.testing.assert_array_equal(scales[:, 0], 2.0 ** np.ceil(np.log2(least)))
        told.append(f"{name} {np.count_nonzero(~same)} of {len(x)}")
    return f"another scale in qwix: {', '.join(told)}"


def arrays_of_bfloat16() -> str:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4000, BLOCK)), jnp.bfloat16)
    wide = np.asarray(x, np.float32)
    values, scales = ours(x)
    assert_same_bits(values, scales, *theirs(wide, {1: BLOCK}))
    their_values, their_scales = theirs(x, {1: BLOCK})
    assert their_scales.dtype == jnp.bfloat16

    def error(values, scales):
        back = values.astype(np.float32) * scales.astype(np.float32)
        return np.linalg.norm(back - wide) / np.linalg.norm(wide)

    other = np.mean(values.view(np.uint8) != their_values.view(np.uint8))
    mine, his = error(values, scales), error(their_values, their_scales)
    assert 0 < other < 0.1 and mine < his < 1.05 * mine
    return (
        f"{other:.1%} of the values differ; relative error {mine:.4f} here, {his:.4f} in qwix; "
        "equal if cast to float32 first"
    )


COMPARISONS: tuple[Callable[[], str], ...] = (
    tiles_along_either_axis, hard_tiles, blocks, rows_of_experts, ragged, not_finite,
    zeros_and_the_least_scale, powers_of_two, arrays_of_bfloat16,
)  # fmt: skip


def main() -> None:
    wrong = 0
    for compare in COMPARISONS:
        try:
            told = compare()
        except AssertionError as error:
            wrong += 1
            told = f"WRONG: {' '.join(str(error).split())[:200]}"
        print(f"{compare.__name__.replace('_', ' '):26} {told}", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
