"""The quantiser of activations, in JAX's interpreter, against NumPy: every bit of hard tiles."""

import functools

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import tiles as equations
from hard_tiles import assert_same_bits, broken

from deepseek_jax.kernels.fp8_quantise import PerRow, Square, quantise
from deepseek_jax.precision.fp8_tiles import FLOOR, LARGEST

pytestmark = pytest.mark.usefixtures("strict_dtypes")

kernel = functools.partial(quantise, largest=LARGEST, floor=FLOOR, interpret=interpreted.GPU)


def test_both_kinds_of_tiles():
    """Random, denormal, huge, zero and mixed tiles, with NaN of either sign and infinities."""
    x = jnp.asarray(broken(384, 128), jnp.bfloat16)
    both = jax.jit(lambda x: kernel([Square(x)], None, 128, rows=True, tokens=True))
    (rows, row_scales), (tokens, token_scales) = interpreted.run(both, x)
    assert np.isnan(np.asarray(rows, np.float32)).any(1).sum() > 5
    wide = np.asarray(x, np.float32)
    assert_same_bits(rows, row_scales.T, *equations.quantise(wide, True))
    assert_same_bits(tokens, token_scales.T, *equations.quantise(wide.T.copy(), True))


def test_sizes_that_no_square_takes():
    x = Square(jnp.zeros((96, 128), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"96 x 128 is not in squares of 128 x 128; pad it"):
        kernel([x], None, 128, rows=True, tokens=False)
    table = jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"96 x 128 is not in squares of 64 x 128; pad it"):
        kernel([x, PerRow(jnp.zeros((1, 96)))], None, 128, rows=False, tokens=True, tiles=table)
    with pytest.raises(ValueError, match="ask for them without `tiles`"):
        x = Square(jnp.zeros((128, 128), jnp.bfloat16))
        kernel([x], None, 128, rows=True, tokens=True, tiles=table)
