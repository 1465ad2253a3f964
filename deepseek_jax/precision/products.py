"""Products of two arrays, summed in float32: what every recipe's matmuls are made of."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def exact_einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """a times b in float32, whatever the dtype of the two; float32 operands keep all their bits."""
    exact = "highest" if a.dtype == jnp.float32 else None  # no TF32 behind our back
    return jnp.einsum(subscripts, a, b, precision=exact, preferred_element_type=jnp.float32)


def row_product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The same where the rows of both are summed over, as in "MD,MF->DF": a weight's gradient.

    XLA's fast matmul for CPUs (YNNPACK) takes sums over the last axis of `a` alone; others fall to
    one that needs up to twice the time. So on a CPU `a` is transposed first, in memory.
    """
    of_a, of_b, of_out = subscripts.replace("->", ",").split(",")
    rows = "".join(letter for letter in of_a if letter not in of_out)
    turned = "".join(letter for letter in of_out if letter in of_a) + rows

    def transposed_first(a, b):
        a = lax.optimization_barrier(jnp.einsum(f"{of_a}->{turned}", a))
        return exact_einsum(f"{turned},{of_b}->{of_out}", a, b)

    plain = functools.partial(exact_einsum, subscripts)
    return lax.platform_dependent(a, b, cpu=transposed_first, default=plain)
