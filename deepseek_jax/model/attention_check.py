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

from deepseek_jax.kernels import attention_cudnn, kernel_names, latent_attention
from deepseek_jax.kernels.attention_cudnn import AttentionKernel
from deepseek_jax.model import absorbed_attention
from deepseek_jax.model.causal_attention import FusedAttention
from deepseek_jax.precision import fp8_checks
from deepseek_jax.runtime.kernel_check import Check


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

    def agrees(self) -> jax.Array:
        """Whether each result of the kernel agrees with the portable form, bool; a NaN does not."""
        return self.differences() <= self.tolerance

    def differences(self) -> jax.Array:
        """Largest difference of each result, relative to its largest magnitude, float32."""
        keys = jax.random.split(jax.random.key(0), len(self.inputs))
        given = [
            jax.random.normal(key, like.shape, like.dtype)
            for key, like in zip(keys, self.inputs, strict=True)
        ]
        pairs = zip(self.kernel(*given), self.portable(*given), strict=True)
        found = [
            _relative(own.astype(jnp.float32), want.astype(jnp.float32)) for own, want in pairs
        ]
        return jnp.stack(found)


def checks() -> dict[str, Check]:
    """The checks by name of the kernel: whether each result agrees, which all of them have to."""

    def of(each: KernelCheck, results: int) -> Check:
        return Check(
            lambda: jax.jit(each.agrees)(), lambda: jnp.ones(results, bool), fp8_checks.HOPPER
        )

    found = {name: of(causal(name), 5) for name in attention_cudnn.BY_NAME}
    return {**found, kernel_names.LATENT_ATTENTION: of(latent(), 2)}


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


def latent() -> KernelCheck:
    """Absorbed attention at V3's widths; one request fills whole steps, one ends inside of one.

    Results, and the weights before their sum, are rounded to bfloat16. A part that is missing, or a
    mask that is off by one position, differs by 2^-4 and more in the short request.
    """
    shapes = (2, 2, 40, 512), (2, 2, 40, 64), (2, 1024, 512), (2, 1024, 64)

    def of(attend: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
        def run(*given: jax.Array, shift: int = 0) -> tuple[jax.Array, ...]:
            positions = jnp.array([[1022, 1023], [6, 7]], jnp.int32) - shift
            return tuple(attend(*given, positions, scale=576**-0.5))

        return run

    return KernelCheck(
        of(functools.partial(latent_attention.attend, splits=2)),
        of(absorbed_attention.latent_attention_in_full),
        tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes),
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
