"""Residuals of a layer that a recompute policy can save for backward, by name.

What a layer computes and does not name is recomputed wherever `model/remat.py` saves names alone.
"""

import enum
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Tree = TypeVar("Tree")


class Saved(enum.StrEnum):
    """Residuals that cost a matmul or a message to compute again (section 3.2.3).

    Outputs of norms, MLA up-projections and SwiGLU have no name: these residuals are their inputs.
    """

    QUERY_LATENT = "query_latent"  # c^Q, before its norm
    KV_LATENT = "kv_latent"  # c^KV, before its norm
    KEY_ROPE = "key_rope"  # k^R, before rotation
    ATTENTION = "attention"  # heads' outputs, before W^O
    ATTENTION_SUM = "attention_sum"  # logarithm of each softmax's sum, where a kernel asks for it
    ATTENDED = "attended"  # the residual stream after attention
    GATE_UP = "gate_up"  # inputs of SwiGLU
    ARRIVED = "arrived"  # tokens and routing weights at their experts
    ROUTE = "route"  # chosen experts, and the slots of their copies
    MOE_OUTPUT = "moe_output"  # the output of a mixture of experts
    LAYER_PASS = "layer_pass"  # all that a `LayerPass` keeps


def save(name: Saved, tree: Tree) -> Tree:
    """The same arrays, under a name that a recompute policy can save.

    Every named residual passes through here, in the form in which it is saved: `kept_input.py`
    names the FP8 tiles of an input, and not the input.

    FP8 numbers are saved as their bytes. `jax.checkpoint` rounds what it saves to the exponent and
    mantissa bits of its dtype by the rules of IEEE, which has no finite number with all exponent
    bits set; E4M3 has those of 256 to 448, and each would become NaN.

    The heads BSHW of attention are saved as BS(HW). They are computed heads first, and with four
    axes XLA would give the array that a pipeline carries that order, and copy it whole each tick.
    """

    def one(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 1:
            bits = one(lax.bitcast_convert_type(x, jnp.uint8))
            return lax.bitcast_convert_type(bits, x.dtype)
        merged = x.reshape(*x.shape[:2], -1) if x.ndim > 3 else x
        return checkpoint_name(merged, name.value).reshape(x.shape)

    return jax.tree.map(one, tree)
