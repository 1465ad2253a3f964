"""Tiles on which quantisers go wrong, of ordinary, denormal, huge, zero and non-finite numbers."""

import numpy as np

DENORMAL = np.float32(1e-40)
HUGE = np.nextafter(np.float32(2**127), np.float32(0))  # the largest that quantisers take


def hard(*shape: int, seed: int = 0) -> np.ndarray:
    """Finite float32: runs of 64 rows of one kind, and of one magnitude along each row.

    The kinds are random, denormal, huge, zero (of either sign), and all of them beside one another.
    """
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape).astype(np.float32)
    kinds = [x, x * DENORMAL, np.clip(x / 4, -1, 1) * HUGE, 0 * x]
    magnitude = 10.0 ** random.uniform(-25, 25, (*shape[:-1], 1))
    mixed = np.choose(random.integers(0, 4, shape), kinds)
    kinds = [(x * magnitude).astype(np.float32), *kinds[1:], mixed]
    kind = np.arange(shape[-2])[:, None] // 64 % len(kinds)
    return np.choose(np.broadcast_to(kind, shape), kinds)


def broken(*shape: int, seed: int = 0) -> np.ndarray:
    """`hard` with a NaN of either sign and infinities, far apart."""
    x = hard(*shape, seed=seed)
    flat = x.reshape(-1, shape[-1])
    for number, row in enumerate(range(1, len(flat), 47)):
        flat[row, 5 * row % shape[-1]] = (np.nan, np.inf, -np.nan, -np.inf)[number % 4]
    return x


def assert_same_bits(
    values: np.ndarray, scales: np.ndarray, want_values: np.ndarray, want_scales: np.ndarray
) -> None:
    """Values and scales bit for bit, the sign of a zero too; a NaN is any NaN."""
    values, want_values = np.asarray(values), np.asarray(want_values)
    np.testing.assert_array_equal(np.asarray(scales), want_scales)
    nan = np.isnan(want_values.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(values.astype(np.float32)), nan)
    np.testing.assert_array_equal(
        np.where(nan, 0, values.view(np.uint8)), np.where(nan, 0, want_values.view(np.uint8))
    )
