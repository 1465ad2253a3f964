"""Arrays packed into one message and unpacked again are equal to the bit."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.parallel.experts import message
from deepseek_jax.parallel.experts.message import Field

pytestmark = pytest.mark.usefixtures("strict_dtypes")

DTYPES = [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.uint16, np.uint8, np.int32]


@pytest.mark.parametrize("width", [1, 3, 8])
def test_every_bit_comes_back(width):
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.integers(0, 256, (5, width * np.dtype(d).itemsize), np.uint8).view(d))
        for d in DTYPES
    ]
    words = message.pack(arrays)
    fields = [Field.of(x) for x in arrays]
    assert words.dtype == jnp.uint32 and words.shape == (5, sum(f.words for f in fields))
    for sent, got in zip(arrays, message.unpack(words, fields), strict=True):
        assert got.dtype == sent.dtype
        assert np.asarray(got).tobytes() == np.asarray(sent).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rows_are_read_as_numbers_and_rounded_once(dtype):
    """Special values too; a sum is that of float32, rounded."""
    rows = np.array([[1.5, -0.0, np.inf, 3e-39], [256.0, 1.0, -2.0, 7.0]], np.float32)
    rows = jnp.asarray(rows.astype(dtype))
    words = message.pack((rows,))
    parts = message.numbers(words, rows.dtype)
    np.testing.assert_array_equal(message.of_numbers(parts, rows.dtype), words)
    total = tuple(part[:1] + part[1:] for part in parts)
    (got,) = message.unpack(message.of_numbers(total, rows.dtype), [Field.of(rows)])
    want = (rows[:1].astype(jnp.float32) + rows[1:].astype(jnp.float32)).astype(rows.dtype)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_other_rows_are_not_summed():
    with pytest.raises(ValueError, match="float16"):
        message.numbers(jnp.zeros((1, 1), jnp.uint32), jnp.dtype(jnp.float16))


def test_fields_are_whole_words():
    assert Field((8,), jnp.dtype(jnp.bfloat16)).words == 4
    assert Field((7,), jnp.dtype(jnp.uint8)).words == 2
    assert Field((3, 3), jnp.dtype(jnp.uint16)).words == 5
