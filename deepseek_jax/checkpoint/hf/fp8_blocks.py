"""Matrices as the FP8 blocks of published checkpoints: 128x128 values in E4M3, a scale for each.

What came from such blocks goes back to them without a loss: from the values q * s alone, scales are
found with which every one of them is a product again. Rounded to float32, the largest value of a
block leaves few scales to try: E4M3 has eight significands, and each leaves a few neighbours.
"""

import itertools

import numpy as np

from deepseek_jax.precision.fp8_tiles import BLOCK, E4M3, LARGEST

# What the largest value of a block may be stored as: the E4M3 values of eight significands, each
# with the largest exponent. Quantisers divide by LARGEST, so it comes first.
_TOPS = (LARGEST, 256.0, 288.0, 320.0, 352.0, 384.0, 416.0, 240.0)
_NEIGHBOURS = (0, -1, 1, -2, 2)  # float32 steps away from largest / top
_SAMPLE = 61  # every so many values of a block rule out nearly every wrong scale


def quantise_blocks(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 values and float32 scales, `value * scale` in float32 being near the matrix.

    Exact, in every bit of float32, for each block that is such a product already; the values and
    scales are then those that it was made of, if its largest value was stored as 448. Other blocks
    get scale = largest / 448: at worst 2^-4 of a value or 2^-10 of the scale off.

    Args:
      matrix: float32 [out, in], finite.

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
        scales[number] = _scales(blocks)
        stored = _stored(blocks, scales[number]).reshape(across, len(band), BLOCK)
        values[start : start + BLOCK] = stored.transpose(1, 0, 2).reshape(len(band), -1)[
            :, :columns
        ]
    return values, scales


def _scales(blocks: np.ndarray) -> np.ndarray:
    """One scale for each row of float32 values."""
    largest = np.abs(blocks).max(1)
    scales = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1))
    left = np.flatnonzero(largest)
    for top, steps in itertools.product(_TOPS, _NEIGHBOURS):
        if not len(left):
            break
        guess = (largest[left] / np.float32(top)).view(np.int32) + steps
        guess = guess.astype(np.int32).view(np.float32)
        likely = np.flatnonzero(_is_product(blocks[left, ::_SAMPLE], guess))
        exact = likely[_is_product(blocks[left[likely]], guess[likely])]
        scales[left[exact]] = guess[exact]
        left = np.delete(left, exact)
    return scales


def _is_product(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Whether each row is E4M3 values times its scale."""
    return (_stored(values, scales).astype(np.float32) * scales[:, None] == values).all(1)


def _stored(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.clip(values / scales[:, None], -LARGEST, LARGEST).astype(E4M3)
