"""Whether a layout fits a chip, and the changes that make it fit, in words."""

import contextlib
from collections.abc import Iterator
from typing import Any

from deepseek_jax.config import Config, ConfigError
from deepseek_jax.hardware.chips import Chip
from deepseek_jax.plan.changed_config import is_accepted, replace
from deepseek_jax.plan.device_memory import ACTIVATIONS, GIB, MESSAGES, TEMPORARIES, device_memory
from deepseek_jax.plan.memory_floor import closed_form_bytes
from deepseek_jax.plan.peak import RESERVE_BYTES, room_bytes

OF_TOKENS = (ACTIVATIONS, MESSAGES, TEMPORARIES)  # items that grow with tokens of a device


def report(config: Config, chip: Chip) -> dict[str, Any]:
    """Room of a chip, what the config needs beyond it, and the remedies.

    Args:
      config: Config of the run, whose mesh has no -1.
      chip: Chip.

    Returns:
      Dictionary: "chip", "room_bytes", "over_bytes" (negative where it fits), "largest" (the
      largest item of memory), and "remedies", texts.
    """
    found, room = device_memory(config), room_bytes(chip)
    over = found.peak - room
    return {
        "chip": chip.name,
        "room_bytes": room,
        "over_bytes": over,
        "largest": found.largest,
        "remedies": list(_remedies(config, room)) if over > 0 else [],
    }


def text(found: dict[str, Any]) -> str:
    """Text of `report`."""
    room, over = found["room_bytes"] / GIB, found["over_bytes"] / GIB
    kept = f"{RESERVE_BYTES / GIB:.0f} GiB are kept for CUDA, messages and fragmentation"
    if over <= 0:
        return f"Fits {found['chip']}: {-over:.1f} of {room:.1f} GiB are free; {kept}."
    lines = [
        f"Does not fit {found['chip']}: {over:.1f} GiB more than the {room:.1f} of a program;",
        f"{kept}. The largest item is {found['largest']}.",
    ]
    return "\n".join([*lines, *(f"  {remedy}" for remedy in found["remedies"])])


def nothing_fits(smallest: Config, size: int, chip: Chip, devices: int) -> str:
    """Message of a search without a layout that fits.

    Args:
      smallest: Layout that needs the least.
      size: Bytes that it needs.
      chip: Chip.
      devices: Number of devices.
    """
    found, room = device_memory(smallest), room_bytes(chip)
    message = (
        f"no layout of {devices} devices fits: the smallest needs {size / GIB:.1f} GiB "
        f"of a device, and a program may use {room / GIB:.1f} GiB of {chip.name}"
    )
    if found.largest not in OF_TOKENS:
        return f"{message}; most of it is {found.largest}: use more devices"
    longest = _longest(smallest, room)
    fit = f"sequences of {longest:,} tokens fit" if longest else "no shorter ones fit"
    return (
        f"{message}; most of it is {found.largest} of one sequence of batch.length="
        f"{smallest.batch.length}, which no axis of the mesh splits (no context parallelism): in "
        f"its layout {fit}"
    )


def _remedies(config: Config, room: int) -> Iterator[str]:
    """Changes of recomputation and micro-batch, alone and together, then shorter sequences."""
    full = replace(config, "layout", recompute="full")
    parts = config.mesh.replica * config.mesh.node * config.mesh.gpu
    fewest = replace(config, "batch", micro_sequences=parts)
    both = replace(full, "batch", micro_sequences=parts)
    flags = {
        "--config.layout.recompute=full": full,
        f"--config.batch.micro_sequences={parts}": fewest,
        f"--config.layout.recompute=full --config.batch.micro_sequences={parts}": both,
    }
    fits = False
    seen = [config]
    for line, changed in flags.items():
        if changed in seen or not is_accepted(changed):
            continue
        seen.append(changed)
        size = closed_form_bytes(changed)
        fits = fits or size <= room
        yield f"{line}: {size / GIB:.1f} GiB, {'fits' if size <= room else 'does not fit'}"
    if fits:
        return
    smallest = both if is_accepted(both) else full
    found = device_memory(smallest)
    if found.largest not in OF_TOKENS:
        yield "More pipeline ranks, experts over more nodes, or more devices: see --search."
    elif longest := _longest(smallest, room):
        yield "A sequence stays whole on a device (no context parallelism). With the fewest tokens"
        yield f"and all computed again, {longest:,} tokens fit; --search has other layouts."
    else:
        yield "No shorter length fits this layout: see --search."


def _longest(config: Config, room: int) -> int:
    """Tokens of the longest sequences, in powers of two, with which a config fits; 0 for none."""
    length = config.batch.length
    while length > 1:
        length = 1 << ((length - 1).bit_length() - 1)
        shorter = replace(config, "batch", length=length)
        with contextlib.suppress(ConfigError):  # buffers without a slot
            if closed_form_bytes(shorter) <= room:
                return length
    return 0
