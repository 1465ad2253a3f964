"""Attention kernels at V3's sizes, as cases of `kernel_case.py`.

B requests, S new positions, T positions of a cache, H heads, X and W widths of keys and values, C
and R widths of latents and rotary keys. All is BF16; the portable forms are XLA's, in blocks of
queries for training and with all scores in memory for decoding. FLOPs are those of the half of the
scores that a causal mask leaves.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.bench.kernel_case import (
    KERNEL,
    PORTABLE,
    Form,
    KernelCase,
    Operands,
    numbers,
    traffic,
)
from deepseek_jax.bench.product_cases import LARGE
from deepseek_jax.config import ModelConfig
from deepseek_jax.kernels import attention_cudnn, latent_attention
from deepseek_jax.kernels.kernel_names import ATTENTION, LATENT_ATTENTION
from deepseek_jax.model.absorbed_attention import latent_attention_in_full
from deepseek_jax.model.causal_attention import FusedAttention

FORWARD_GOAL, BACKWARD_GOAL = 550.0, 450.0  # TFLOP/s
# Requests and positions of their caches: more than the L2 of a GPU holds, from many short requests
# to a long one.
CACHES = (128, 4096), (128, 1024), (32, 4096), (8, 32_768), (1, 131_072)
_BLOCK = 512  # of queries, in the portable form


def causal(model: ModelConfig, length: int, check: str = ATTENTION) -> list[KernelCase]:
    """Forward and backward of one sequence by cuDNN.

    Args:
      check: `ATTENTION`, or that of the kernel for values padded to the width of keys.
    """
    heads, width, value = model.heads, model.d_nope + model.d_rope, model.d_value
    shape = 1, length, heads, width, value
    scale = width**-0.5
    core = FusedAttention(attention_cudnn.BY_NAME[check], scale, _BLOCK)
    forms = {KERNEL: core.kernel, PORTABLE: core.in_blocks()}
    forward = {name: functools.partial(form.forward, scale=scale) for name, form in forms.items()}
    backward = {name: functools.partial(form.backward, scale=scale) for name, form in forms.items()}

    def inputs(seed: jax.Array) -> Operands:
        widths = width, width, value
        return tuple(numbers(seed + i, (1, length, heads, wide)) for i, wide in enumerate(widths))

    def draw(seed: jax.Array) -> Mapping[str, Operands]:
        made = inputs(seed)
        return {KERNEL: made, PORTABLE: made}

    def draw_backward(seed: jax.Array) -> Mapping[str, Operands]:
        query, keys, values = inputs(seed)
        # Random numbers in place of forward's results: their time is the same.
        log_sums = jnp.full((1, heads, length), jnp.log(float(length)))
        made = query, keys, values, values, log_sums, values
        return {KERNEL: made, PORTABLE: made}

    name = "cuDNN" if check == ATTENTION else "cuDNN, values padded"
    per_product = length * length * heads  # multiply-adds of half the scores, times two
    found = []
    for piece, made, chosen, widths, goal in (
        ("attention forward", draw, forward, width + value, FORWARD_GOAL),
        ("attention backward", draw_backward, backward, 3 * width + 2 * value, BACKWARD_GOAL),
    ):
        flops = per_product * widths
        found.append(
            KernelCase(
                piece=piece,
                name=name,
                shape=shape,
                check=check,
                draw=made,
                forms=chosen if check == ATTENTION else {KERNEL: chosen[KERNEL]},
                bytes=traffic(made, chosen[PORTABLE]),
                flops=flops,
                dtype="bfloat16",
                goal=goal if check == ATTENTION and flops >= LARGE else None,
            )
        )
    return found


def decoding(model: ModelConfig, requests: int, length: int) -> KernelCase:
    """Attention of a new token of each request to its full cache of `length` positions."""
    heads, latent, rope = model.heads, model.kv_latent, model.d_rope
    scale = (model.d_nope + rope) ** -0.5

    def draw(seed: jax.Array) -> Mapping[str, Operands]:
        shapes = (1, heads, latent), (1, heads, rope), (length, latent), (length, rope)
        made = [numbers(seed + i, (requests, *shape)) for i, shape in enumerate(shapes)]
        positions = jnp.full((requests, 1), length - 1, jnp.int32)
        return {KERNEL: (*made, positions), PORTABLE: (*made, positions)}

    def form(attend: Any) -> Form:
        return functools.partial(attend, scale=scale)

    forms = {KERNEL: form(latent_attention.attend), PORTABLE: form(latent_attention_in_full)}
    return KernelCase(
        piece="latent attention",
        name=f"{requests} x {length:,} positions",
        shape=(requests, length, heads, latent, rope),
        check=LATENT_ATTENTION,
        draw=draw,
        forms=forms,
        bytes=traffic(draw, forms[PORTABLE]),
        flops=2 * requests * heads * length * (2 * latent + rope),
        dtype="bfloat16",
        by_bytes=True,
    )
