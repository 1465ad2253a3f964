"""Small problems on which a GPU shows that an attention kernel computes what portable code does.

Sums are not exact here, so that a difference to the bit would say nothing: both forms round the
softmax to bfloat16, but before or after its division, and sum in another order.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.kernels import attention_cudnn
from deepseek_jax.kernels.attention_cudnn import AttentionKernel
from deepseek_jax.model.causal_attention import FusedAttention


@dataclasses.dataclass(frozen=True)
class KernelCheck:
    """A kernel's check.

    Attributes:
      kernel, portable: functions of `inputs` with the same results: a tuple of arrays.
      inputs: shapes and dtypes of the arguments.
      tolerance: largest difference of a result, relative to its largest magnitude.
    """

    kernel: Callable[..., Any]
    portable: Callable[..., Any]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    tolerance: float

    def difference(self) -> jax.Array:
        """Largest difference of all results, each relative to its largest; NaN if one is NaN."""
        keys = jax.random.split(jax.random.key(0), len(self.inputs))
        given = [
            jax.random.normal(key, like.shape, like.dtype)
            for key, like in zip(keys, self.inputs, strict=True)
        ]
        pairs = zip(self.kernel(*given), self.portable(*given), strict=True)
        found = [
            _relative(own.astype(jnp.float32), want.astype(jnp.float32)) for own, want in pairs
        ]
        return jnp.stack(found).max()


def causal(name: str) -> KernelCheck:
    """Attention at V3's widths, forward and backward, over a few blocks of positions.

    Results are the output, the logarithms of sums, and the gradients. Each is rounded to bfloat16,
    and so are softmax and gradient of scores before they are summed: 2^-9 of a value for each. A
    mask that is off by one position, or another scale, differs by 2^-3 and more.

    Args:
      name: one of `attention_cudnn.BY_NAME`.
    """
    core = FusedAttention(attention_cudnn.BY_NAME[name], scale=192**-0.5, block=128)
    wide, narrow = (jax.ShapeDtypeStruct((1, 320, 2, w), jnp.bfloat16) for w in (192, 128))
    return KernelCheck(
        functools.partial(_results, core.kernel, core.scale),
        functools.partial(_results, core.in_blocks(), core.scale),
        (wide, wide, narrow, narrow),
        tolerance=2.0**-6,
    )


def _results(
    kernel: AttentionKernel,
    scale: float,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, ...]:
    out, log_sums = kernel.forward(query, key, value, scale=scale)
    gradients = kernel.backward(query, key, value, out, log_sums, d_out, scale=scale)
    return out, log_sums, *gradients


def _relative(own: jax.Array, want: jax.Array) -> jax.Array:
    return jnp.abs(own - want).max() / jnp.abs(want).max()
