"""Slots of the expert dispatch's buffers, from the capacity factor."""

import math

from deepseek_jax.config.hints import need
from deepseek_jax.config.schema import ModelConfig


def most_nodes(model: ModelConfig) -> int:
    """Nodes that one token may visit (section 2.1.2), each group of experts being on one node."""
    return min(model.top_groups, model.top_k) if model.groups > 1 else model.top_k


def buffer_slots(
    capacity_factor: float,
    tokens: int,
    top_k: int,
    experts: int,
    parts: tuple[int, ...],
    nodes: int,
) -> tuple[int, ...]:
    """Copies that fit into the buffers of an exchange: `capacity_factor` times a balanced load.

    Args:
      capacity_factor: `layout.capacity_factor`.
      tokens: of one device.
      parts: devices along each hop, outermost first.
      nodes: the most destinations of one token on the first hop, if a second one follows.

    Returns:
      Slots for each destination of each hop, then those of a device's experts. None is larger than
      the worst router could fill.

    Raises:
      ConfigError: a buffer has no slot at all, so that no round would move a token.
    """
    slots, rows, crossed, least = [], tokens, 1, 1.25
    for number, count in enumerate(parts):
        crossed *= count
        copies = min(top_k, crossed)
        if number == 0 and len(parts) > 1:
            copies = min(copies, nodes)
        slots.append(int(min(rows, capacity_factor * tokens * copies / count)))
        least = max(least, math.ceil(100 * count / (tokens * copies)) / 100)
        rows = count * slots[-1]
    slots.append(int(min(rows * min(top_k, experts // crossed), capacity_factor * tokens * top_k)))
    need(
        min(slots) >= 1,
        f"layout.capacity_factor={capacity_factor} times the mean load of {tokens} tokens a device "
        "leaves a buffer without a single slot, and no token would ever move; "
        f"set layout.capacity_factor={least}",
    )
    return tuple(slots)
