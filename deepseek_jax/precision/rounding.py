"""Rounding to a narrow type that stays in the compiled program."""

import jax
from jax.typing import DTypeLike


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`x.astype(dtype)`, which a later cast to a wider type does not undo.

    XLA's GPU compiler drops a cast to a narrower float and back within one program, because
    `xla_allow_excess_precision` is on by default: the value would never be rounded. It does not
    look through an optimization barrier. XLA's CPU compiler keeps both casts, so tests on a CPU do
    not see the difference.
    """
    return jax.lax.optimization_barrier(x.astype(dtype))
