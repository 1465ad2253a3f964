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

    XLA's fast matmul for CPUs (YNNPACK) takes sums over the last axis of the left operand alone;
    others fall to one that needs up to twice the time. So on a CPU the narrower operand is
    transposed first, in memory, and stands on the left.
    """
    of_a, of_b, of_out = subscripts.replace("->", ",").split(",")
    rows = "".join(letter for letter in of_a if letter not in of_out)

    def narrow_first(a, b):
        (narrow, of_narrow), (wide, of_wide) = sorted(((a, of_a), (b, of_b)), key=_size)
        left, right = _common(of_narrow, of_out), _common(of_wide, of_out)
        turned = lax.optimization_barrier(jnp.einsum(f"{of_narrow}->{left}{rows}", narrow))
        product = exact_einsum(f"{left}{rows},{of_wide}->{left}{right}", turned, wide)
        if left + right == of_out:
            return product
        # Or XLA would transpose the wide operand instead.
        return jnp.einsum(f"{left}{right}->{of_out}", lax.optimization_barrier(product))

    plain = functools.partial(exact_einsum, subscripts)
    return lax.platform_dependent(a, b, cpu=narrow_first, default=plain)


def _size(operand: tuple[jax.Array, str]) -> int:
    return operand[0].size


def _common(letters: str, others: str) -> str:
    return "".join(letter for letter in letters if letter in others)
