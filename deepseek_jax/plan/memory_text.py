"""Text of the memory of a device at its worst moment."""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.plan import memory_errors
from deepseek_jax.plan.device_memory import GIB, ITEMS, DeviceMemory


def row(memory: DeviceMemory) -> dict[str, Any]:
    """Dictionary with stable keys; bytes."""
    return {
        "peak": memory.peak,
        "items": dict(memory.items),
        "largest": memory.largest,
        "moment": memory.moment,
        "held_micro_batches": memory.held,
        "held_layers": memory.layers_held,
        "kept_of_a_layer": sum(memory.kept_per_layer.values()),
        "ema_host": memory.ema_host,
    }


def text(memory: DeviceMemory, kind: str) -> str:
    """Table of the items, the largest of them marked, and errors of such estimates by kind."""
    lines = [f"Device memory at the worst moment, {memory.moment}:"]
    for name, size in memory.items.items():
        mark = "  <- largest" if name == memory.largest else ""
        lines.append(f"  {name:28}{size / GIB:>10.2f} GiB{mark}")
    kept = sum(memory.kept_per_layer.values())
    lines += [
        f"  {'= peak':28}{memory.peak / GIB:>10.2f} GiB",
        f"Activations: {memory.held} micro-batches x {memory.layers_held} layers held; an MoE "
        f"layer keeps {kept / 1e6:,.0f} MB of each.",
        "Estimated; cuDNN's workspace and NCCL's buffers come on top.",
        memory_errors.text(kind),
    ]
    return "\n".join(lines)


def by_recipe(memories: Mapping[tuple[str, str], DeviceMemory]) -> str:
    """Table of the memory in each recipe and with each recomputation, in GiB; * the largest item.

    Items that none of them has are left out.
    """
    names = [name for name in ITEMS if any(each.items[name] for each in memories.values())]
    split = [name.rpartition(" ") for name in names]  # heads in two lines
    lines = [
        _line("", [f"{first} " for first, _, _ in split]),
        _line("GiB of a device", [f"{last} " for *_, last in split] + ["peak"]),
    ]
    for (recipe, policy), each in memories.items():
        cells = [
            f"{each.items[name] / GIB:.2f}{'*' if name == each.largest else ' '}" for name in names
        ]
        lines.append(_line(f"  {recipe:10}  {policy}", [*cells, f"{each.peak / GIB:.2f}"]))
    return "\n".join(lines)


def _line(label: str, cells: list[str]) -> str:
    return f"{label:23}{''.join(f'{cell:>13}' for cell in cells)}".rstrip()
