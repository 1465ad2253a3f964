"""FP8 tiles (section 3.3.2): 1x128 values in E4M3 under one scale, tile by tile."""

import math

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn
LARGEST, SMALLEST_MAXIMUM = 448.0, 1e-12


def scale(tile: np.ndarray, power_of_two: bool) -> np.float32:
    """max(|tile|) / 448, or the least power of two that is not below it; max if not finite."""
    largest = max(float(np.abs(tile).max()), float(np.float32(SMALLEST_MAXIMUM)))
    if not math.isfinite(largest):
        return np.float32(largest)
    if not power_of_two:
        return np.float32(largest) * np.float32(1 / LARGEST)  # a product, as compilers have it
    mantissa, exponent = math.frexp(largest / LARGEST)  # float64: exact enough for any float32
    return np.float32(math.ldexp(1.0, exponent - (mantissa == 0.5)))


def quantise_tile(x: np.ndarray, power_of_two: bool) -> tuple[np.ndarray, np.float32]:
    """A tile or block x of any shape, float32 -> its values E4M3 and its scale.

    If x has a NaN, so are the scale and all values. If it has an infinity, the scale is infinite,
    and 1 / scale is 0 (infinity / infinity is NaN), or NaN for the bits of a power of two.
    """
    s = scale(x, power_of_two)
    with np.errstate(invalid="ignore"):
        inverse = np.float32(np.nan if power_of_two and np.isinf(s) else np.float32(1) / s)
        return np.clip(x * inverse, -LARGEST, LARGEST).astype(E4M3), s


def quantise(x: np.ndarray, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """x (..., D) float32 -> values (..., D) E4M3 and scales (..., ceil(D/128)) float32."""
    values = np.empty(x.shape, E4M3)
    scales = np.empty((*x.shape[:-1], math.ceil(x.shape[-1] / 128)), np.float32)
    for *row, number in np.ndindex(*scales.shape):
        tile = (*row, slice(128 * number, 128 * number + 128))
        values[tile], scales[(*row, number)] = quantise_tile(x[tile], power_of_two)
    return values, scales


def dequantise(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float64, (..., D)."""
    tile = np.arange(values.shape[-1]) // 128
    return values.astype(np.float64) * scales.astype(np.float64)[..., tile]
