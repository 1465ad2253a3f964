"""Matrices as the FP8 blocks of published checkpoints: 128x128 E4M3 values with one scale each.

A matrix that came from such blocks goes back to them without loss. From the products q * s alone, a
scale is found with which every value of the block is such a product again. The largest value of a
block, rounded to float32, leaves few scales to try: E4M3 has eight significands, and each leaves a
few neighbouring float32 scales.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from deepseek_jax.precision.fp8_tiles import BLOCK, E4M3, LARGEST

# E4M3 values that the largest value of a block may be stored as: the eight significands, each with
# the largest exponent that it has. Quantisers divide by LARGEST, so it comes first.
_TOPS = (LARGEST, 256.0, 288.0, 320.0, 352.0, 384.0, 416.0, 240.0)
_NEIGHBOURS = (0, -1, 1, -2, 2)  # float32 steps away from largest / top
_LEAST_EXPONENT = -126  # of a scale that is a power of two
_SAMPLE = 61  # stride of the values that are tried first; they exclude nearly every wrong scale


def quantise_blocks(
    matrix: np.ndarray, *, powers_of_two: bool = False, former: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 values and float32 scales whose products in float32 approximate the matrix.

    A block that is such a product already is reproduced exactly, in every bit of float32. Values
    and scales are those that it was made of if `former` knows the scale, or if the largest value
    was stored as 448: 448 times s is also 224 times 2s, so products alone do not tell. Other blocks
    get scale = largest / 448, with an error of at most 2^-4 of a value or 2^-10 of the scale.

    Args:
      matrix: float32 [out, in], finite.
      powers_of_two: whether scales are powers of two (`scale_fmt` "ue8m0" of published settings):
        the least one that keeps the largest value in range, where none is exact. None is below
        2^-126, the least that float32 and E8M0 both hold as a normal number.
      former: scales that the matrix may have had, [ceil(out / 128), ceil(in / 128)]; a block that
        is no product of its former scale, as after training, does without.

    Returns:
      values [out, in] float8_e4m3fn, and scales [ceil(out / 128), ceil(in / 128)].
    """
    rows, columns = matrix.shape
    across = -(-columns // BLOCK)
    values = np.empty(matrix.shape, E4M3)
    scales = np.empty((-(-rows // BLOCK), across), np.float32)
    for number, start in enumerate(range(0, rows, BLOCK)):
        band = matrix[start : start + BLOCK]
        padded = np.pad(band, ((0, 0), (0, -columns % BLOCK))).reshape(len(band), across, BLOCK)
        blocks = np.ascontiguousarray(padded.transpose(1, 0, 2)).reshape(across, -1)
        known = None if former is None else former[number].astype(np.float32)
        scales[number] = _scales(blocks, powers_of_two, known)
        stored = _stored(blocks, scales[number]).reshape(across, len(band), BLOCK)
        values[start : start + BLOCK] = stored.transpose(1, 0, 2).reshape(len(band), -1)[
            :, :columns
        ]
    return values, scales


def _scales(blocks: np.ndarray, powers_of_two: bool, former: np.ndarray | None) -> np.ndarray:
    """Scale of each row of float32 values, a row being one block."""
    largest = np.abs(blocks).max(1)
    scales = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1))
    if powers_of_two:
        fractions, exponents = np.frexp(scales)  # scale = fraction 2^exponent, 1/2 <= fraction < 1
        least = np.maximum(exponents - (fractions == 0.5), _LEAST_EXPONENT)
        scales = np.ldexp(np.float32(1), least).astype(np.float32)
    left = np.arange(len(blocks))
    for guess in _guesses(largest, former):
        usable = left[np.isfinite(guess[left]) & (guess[left] > 0)]
        if powers_of_two:
            usable = usable[are_powers_of_two(guess[usable])]
        likely = usable[_is_product(blocks[usable, ::_SAMPLE], guess[usable])]
        exact = likely[_is_product(blocks[likely], guess[likely])]
        scales[exact] = guess[exact]
        left = np.setdiff1d(left, exact, assume_unique=True)
    return scales


def _guesses(largest: np.ndarray, former: np.ndarray | None) -> Iterator[np.ndarray]:
    """Scales that all blocks may have, given their largest values; the likeliest come first."""
    if former is not None:
        yield former
    for top, steps in itertools.product(_TOPS, _NEIGHBOURS):
        guess = (largest / np.float32(top)).view(np.int32) + steps
        yield np.where(largest > 0, guess, 0).astype(np.int32).view(np.float32)


def are_powers_of_two(scales: np.ndarray) -> np.ndarray:
    """Whether each of some finite scales is 2^e with e from -126 to 127, as E8M0 holds."""
    fractions, exponents = np.frexp(scales)
    return (fractions == 0.5) & (exponents - 1 >= _LEAST_EXPONENT)


def _is_product(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Whether each row is E4M3 values times its scale."""
    return (_stored(values, scales).astype(np.float32) * scales[:, None] == values).all(1)


def _stored(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.clip(values / scales[:, None], -LARGEST, LARGEST).astype(E4M3)
