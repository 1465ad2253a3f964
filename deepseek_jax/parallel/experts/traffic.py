"""Bytes of an exchange's messages, from its sizes alone."""

from typing import Any

import jax.numpy as jnp

from deepseek_jax.parallel.experts.dispatch import ExchangePlan, id_dtype
from deepseek_jax.parallel.experts.message import WORD_BYTES
from deepseek_jax.precision.payload import Payload


def message_bytes(
    plan: ExchangePlan, payload: Payload, width: int, dtype: Any, top_k: int
) -> dict[str, list[int]]:
    """Bytes of each hop's all-to-all on one device, outermost hop first.

    Args:
      width: numbers in a token.
      dtype: of these numbers, where the payload does not encode them.

    Returns:
      "send", "combine" and their gradients -> bytes of every hop.
    """

    def words(*fields: int) -> list[int]:
        per_slot = WORD_BYTES * sum(-(-size // WORD_BYTES) for size in fields)
        return [hop.parts * hop.slots * per_slot for hop in plan.hops]

    encoded, summed = payload.bytes_out(width, dtype), width * jnp.dtype(dtype).itemsize
    weights, ids, served = 4 * top_k, id_dtype(plan.total).itemsize * top_k, top_k
    return {
        "send": words(*encoded, weights, ids),
        "combine": words(summed, served),
        "combine gradient": words(*encoded),
        "send gradient": words(summed, weights),
    }
