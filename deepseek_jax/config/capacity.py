"""Buffer slots of the expert dispatch, from the capacity factor."""

import math

from deepseek_jax.config.hints import need
from deepseek_jax.config.schema import ModelConfig


def most_nodes(model: ModelConfig) -> int:
    """Most nodes that one token is sent to (section 2.1.2), with each expert group on one node."""
    return min(model.top_groups, model.top_k) if model.groups > 1 else model.top_k


def buffer_slots(
    capacity_factor: float,
    tokens: int,
    top_k: int,
    experts: int,
    parts: tuple[int, ...],
    nodes: int,
) -> tuple[int, ...]:
    """Buffer slots of one dispatch round: `capacity_factor` times a balanced load.

    Args:
      capacity_factor: `layout.capacity_factor`.
      tokens: Tokens of one device.
      top_k: Experts of a token.
      experts: Routed experts over all devices.
      parts: Devices along each hop, outermost first.
      nodes: Most destinations of one token on the first hop, if a second hop follows.

    Returns:
      Slots per destination of each hop, then slots of a device's experts; none more than the most
      unbalanced router can fill.

    Raises:
      ConfigError: A buffer without a slot, so that no round would move a token.
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
