"""Causal attention by cuDNN on a Hopper GPU, forward and backward, without scores in memory.

    out[s] = sum over t <= s of exp(scale q[s] . k[t] - l[s]) v[t]
    l[s]   = log of the sum over t <= s of exp(scale q[s] . k[t])

B batch, S positions, H heads, X width of queries and keys (V3: 192), W of values (V3: 128).

Backward computes the scores again from queries, keys and l, in blocks that stay on the chip, and
reads the output for the sum of d_out out over W that each row of the softmax's gradient needs.

`UNPADDED` is XLA's own call of cuDNN, for which values need not be as wide as keys. JAX has it
behind private functions, which ask this machine's GPU for its version of cuDNN and its compute
capability, and so refuse to compile for a cluster that is not there; hence the call is made here.
Only a GPU says whether its cuDNN takes the widths (9.10 or later does); then `PADDED`, which is
JAX's public function with zeros added to the values, is left.

Not run on a GPU. XLA adds cuDNN's workspace when it compiles on a GPU, and no compilation without
one counts it.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.kernels import kernel_names

_WIDEST = 256  # of a head, in elements, on Hopper
_ELEMENTS = {"bfloat16": "BF16", "float16": "F16"}  # dtype -> its name in XLA

Gradients = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
    """Causal attention of queries and keys BSHX and values BSHW, on one GPU.

    Attributes:
      forward: (query, key, value, scale) -> output BSHW, and l BHS float32.
      backward: (query, key, value, output, l, gradient of the output, scale) -> gradients of
        queries, keys and values.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., Gradients]


def takes(query: jax.Array, value: jax.Array) -> bool:
    """Whether cuDNN computes attention in this dtype and at these widths of a head."""
    widths = query.shape[-1], value.shape[-1]
    fits = all(width % 8 == 0 and width <= _WIDEST for width in widths)
    return fits and query.dtype.name in _ELEMENTS


def workspace_bytes(queries: tuple[int, ...]) -> int:
    """Memory that cuDNN is expected to take for backward, in bytes: an estimate, not counted.

    It sums the gradient of the queries in float32, and keeps a float32 for each row of the scores.

    Args:
      queries: B, H, S, X.
    """
    *rows, width = queries
    return 4 * math.prod(rows) * (width + 1)


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    batch, length, heads, _ = query.shape
    call = jax.ffi.ffi_call(
        "__cudnn$fmhaSoftmax",
        (
            _heads_first(value),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
            _WORKSPACE,
        ),
        output_layouts=(_BY_POSITION, (0, 1, 2), (0,)),
        custom_call_api_version=2,
        legacy_backend_config=backend_config(query, scale, backward=False),
    )
    out, log_sum, _ = call(query, key, value)
    return out.swapaxes(1, 2), log_sum


def _backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    log_sum: jax.Array,
    d_out: jax.Array,
    scale: float,
) -> Gradients:
    call = jax.ffi.ffi_call(
        "__cudnn$fmhaSoftmaxBackward",
        (*(_heads_first(each) for each in (query, key, value)), _WORKSPACE),
        output_layouts=(_BY_POSITION,) * 3 + ((0,),),
        custom_call_api_version=2,
        legacy_backend_config=backend_config(query, scale, backward=True),
    )
    d_query, d_key, d_value, _ = call(query, key, value, log_sum, d_out, out)
    return d_query.swapaxes(1, 2), d_key.swapaxes(1, 2), d_value.swapaxes(1, 2)


UNPADDED = AttentionKernel(_forward, _backward)


def backend_config(query: jax.Array, scale: float, *, backward: bool) -> str:
    """XLA's `GpuBackendConfig` of the call, as JSON, without fields that have their default."""
    batch, length, heads, _ = query.shape
    shape = [str(size) for size in (batch, heads, length, length)]
    products = _BACKWARD_PRODUCTS if backward else _FORWARD_PRODUCTS
    attention = {
        "algorithm": {
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
        },
        "fmha_scale": scale,
        "intermediate_tensor_shape": {
            "element_type": _ELEMENTS[query.dtype.name],
            "dimensions": shape,
            "layout": {"minor_to_major": ["3", "2", "1", "0"]},
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True,
        "mask_type": "CAUSAL",
        **{name: _dimensions(*each) for name, each in products.items()},
        "max_seg_per_batch": 1,
    }
    return json.dumps({"cudnn_fmha_backend_config": attention})


# Contracted axes of left and right, then their batch axes. Scores are BHST, all else is BSHX.
_FORWARD_PRODUCTS = {
    "bmm1_dot_dimension_numbers": ("3", "3", "02", "02"),  # scores: queries, keys
    "bmm2_dot_dimension_numbers": ("3", "1", "01", "02"),  # output: softmax, values
}
_BACKWARD_PRODUCTS = {
    "bmm1_grad_gemm1_dot_dimension_numbers": ("2", "1", "01", "02"),  # d_key: d_scores, queries
    "bmm1_grad_gemm2_dot_dimension_numbers": ("3", "1", "01", "02"),  # d_query: d_scores, keys
    "bmm2_grad_gemm1_dot_dimension_numbers": ("2", "1", "01", "02"),  # d_value: softmax, d_out
    "bmm2_grad_gemm2_dot_dimension_numbers": ("3", "3", "02", "02"),  # d_softmax: d_out, values
}
_WORKSPACE = jax.ShapeDtypeStruct((0,), jnp.uint8)  # XLA replaces its size
_BY_POSITION = (0, 2, 1, 3)  # BHSX that lies in memory as BSHX


def _dimensions(left: str, right: str, left_batch: str, right_batch: str) -> dict[str, list[str]]:
    return {
        "lhs_contracting_dimensions": list(left),
        "rhs_contracting_dimensions": list(right),
        "lhs_batch_dimensions": list(left_batch),
        "rhs_batch_dimensions": list(right_batch),
    }


def _heads_first(like: jax.Array) -> jax.ShapeDtypeStruct:
    batch, length, heads, width = like.shape
    return jax.ShapeDtypeStruct((batch, heads, length, width), like.dtype)


def _padded_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    wide = _widened(value, query.shape[-1])
    found: Any = jax.nn.dot_product_attention(
        query, key, wide, scale=scale, is_causal=True, implementation="cudnn", return_residual=True
    )
    return found[0][..., : value.shape[-1]], found[1].swapaxes(1, 2)


def _padded_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    log_sum: jax.Array,
    d_out: jax.Array,
    scale: float,
) -> Gradients:
    """JAX's public function takes no output: it computes forward once more."""
    del out, log_sum

    def again(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return _padded_forward(query, key, value, scale)[0]

    return jax.vjp(again, query, key, value)[1](d_out)


PADDED = AttentionKernel(_padded_forward, _padded_backward)


def _widened(x: jax.Array, width: int) -> jax.Array:
    """x ...W with zeros up to ...X."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


# In the order of preference.
BY_NAME = {kernel_names.ATTENTION: UNPADDED, kernel_names.ATTENTION_PADDED: PADDED}


def chosen(kernels: frozenset[str]) -> AttentionKernel | None:
    """The preferred kernel among these names; None if attention has none."""
    return next((kernel for name, kernel in BY_NAME.items() if name in kernels), None)
