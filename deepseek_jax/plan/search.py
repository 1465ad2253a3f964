"""Search of layouts for a number of devices: those that fit, the fastest first.

Best-first: every candidate enters a queue with a lower bound of its time. The one with the lowest
is taken out; its bound is raised by the optimizer, its memory estimated, and where it fits its time
planned, each when it comes to the front again. What comes out with a planned time is therefore
faster than all that is left. Layouts of one mesh and schedule are one family, of which the best is
shown, and which is left out as a whole where its smallest layout does not fit.
"""

import dataclasses
import heapq
import itertools
import math
from typing import Any

from deepseek_jax.config import Config, ConfigError
from deepseek_jax.plan import fits, machine_lookup, step_time
from deepseek_jax.plan.candidates import candidates, overrides
from deepseek_jax.plan.families import Family, Smallest, family_of
from deepseek_jax.plan.machine import Machine
from deepseek_jax.plan.memory_floor import MemoryFloor, closed_form_bytes, is_traced
from deepseek_jax.plan.peak import RESERVE_BYTES, peak_bytes, room_bytes
from deepseek_jax.plan.step_time import StepTime
from deepseek_jax.plan.time_bound import TimeBound
from deepseek_jax.plan.update_time import update_seconds, weight_messages_seconds

EXECUTIONS = ("lockstep", "asynchronous")
SLOWER, TOO_LARGE = 5, 4  # rows of layouts that lose


@dataclasses.dataclass
class Found:
    """Outcome of a search.

    Attributes:
      ranked: Best layout of each family that fits, with step and bytes; the fastest first.
      too_large: Layouts that do not fit, with bytes or a lower bound of them, of families that may
        be faster than the last of `ranked`; the one of a family that needs the least.
      tried: Number of candidates.
    """

    ranked: list[tuple[Config, StepTime, int]]
    too_large: dict[Family, tuple[Config, int]]
    tried: int


def search(
    config: Config,
    devices: int,
    machine: Machine,
    count: int = 3,
    execution: str = "lockstep",
) -> dict[str, Any]:
    """Searches the layouts of a config.

    Args:
      config: Config of the run; its model, step and data stay.
      devices: Number of devices, in nodes of the machine.
      machine: Machine.
      count: Number of proposals.
      execution: "lockstep", as this project runs, or "asynchronous", as published systems do.

    Returns:
      Dictionary with stable keys: "proposed", the fastest that fit; "slower", the next with
      "behind", seconds by part beyond the first; "too_large", faster ones with "over_bytes"; and
      "given", the layout of the config, or None where its mesh is for another number of devices.

    Raises:
      ConfigError: No layout of this number of devices, or none that fits.
    """
    found = _find(config, devices, machine, count, execution)
    best = found.ranked[0][1]
    room = room_bytes(machine.chip)
    rows = [_row(each, config, step, size) for each, step, size in found.ranked]
    for row, (_, step, _) in zip(rows, found.ranked, strict=True):
        row["behind"] = _behind(step, best)
    large = []
    for each, size in _nearest(found, TOO_LARGE, execution):
        step = _step(each, machine, execution)
        large.append({**_row(each, config, step, size), "over_bytes": size - room})
    return {
        "devices": devices,
        "hardware": machine.chip.name,
        "execution": execution,
        "room_bytes": room,
        "reserve_bytes": RESERVE_BYTES,
        "tried": found.tried,
        "proposed": rows[:count],
        "slower": rows[count:],
        "too_large": large,
        "given": _given(config, devices, machine, execution, best),
    }


def _find(config: Config, devices: int, machine: Machine, count: int, execution: str) -> Found:
    """Best-first search; see the head of this file. `count` layouts are proposed, and more lose."""
    bound, room, order = TimeBound(machine, execution), room_bytes(machine.chip), itertools.count()
    queue: list[tuple[float, int, int, Config, StepTime | None]] = []
    layouts = list(candidates(config, devices, machine))
    if not layouts:
        raise ConfigError(_no_layout(config, devices))
    smallest = Smallest(layouts, lambda each: planned_bytes(each, execution))
    for each in layouts:
        queue.append((bound.seconds(each), next(order), 0, each, None))
    found = Found([], {}, len(queue))
    heapq.heapify(queue)
    done: set[Family] = set()
    floor = MemoryFloor()
    while queue and len(found.ranked) < count + SLOWER:
        seconds, number, stage, each, step = heapq.heappop(queue)
        family = family_of(each)
        if family in done:
            continue
        if (least := smallest.of(family))[1] > room:
            done.add(family)
            found.too_large[family] = least
        elif stage == 0 and (size := floor.bytes(each)) <= room:
            heapq.heappush(queue, (seconds + _outside(each, machine), number, 1, each, None))
        elif stage == 1 and (size := planned_bytes(each, execution)) <= room:
            planned = _step(each, machine, execution)
            heapq.heappush(queue, (planned.total, number, 2, each, planned))
        elif step:
            done.add(family)
            found.ranked.append((each, step, planned_bytes(each, execution)))
        else:
            _note(found.too_large, family, each, size)
    if not found.ranked:
        raise ConfigError(fits.nothing_fits(*smallest.least(), machine.chip, devices))
    return found


def planned_bytes(config: Config, execution: str) -> int:
    """Bytes of a device; of a layout whose residuals need a trace, those of its closed form."""
    if not is_traced(config):
        return peak_bytes(config, execution)
    return closed_form_bytes(config)


def _outside(config: Config, machine: Machine) -> float:
    """Seconds of a step that its bound leaves out: optimizer, and messages of weights."""
    gathered = weight_messages_seconds(config, machine) * step_time.micro_batches(config)
    return update_seconds(config, machine) + gathered


def _note(noted: dict[Family, tuple[Config, int]], family: Family, each: Config, size: int) -> None:
    """Remembers what a family that does not fit needs at least."""
    if family not in noted or size < noted[family][1]:
        noted[family] = each, size


def _nearest(found: Found, count: int, execution: str) -> list[tuple[Config, int]]:
    """Layouts that do not fit and need the least, of families that have no layout that fits.

    Sizes that were noted may be lower bounds, so those of the first are planned.
    """
    ranked = {family_of(each) for each, *_ in found.ranked}
    rest = [pair for family, pair in found.too_large.items() if family not in ranked]
    near = sorted(rest, key=lambda pair: pair[1])[:count]
    planned = [(each, max(size, planned_bytes(each, execution))) for each, size in near]
    return sorted(planned, key=lambda pair: pair[1])


def _step(config: Config, machine: Machine, execution: str) -> StepTime:
    times = step_time.times(config, machine_lookup.with_messages(machine, config))
    return step_time.step_time(times, execution)


def _row(config: Config, base: Config, step: StepTime, size: int) -> dict[str, Any]:
    layout = config.layout
    return {
        "mesh": dataclasses.asdict(config.mesh),
        "pipeline": layout.pipeline if config.mesh.pipe > 1 else None,
        "zero": layout.zero,
        "dispatch": layout.dispatch,
        "recompute": layout.recompute,
        "recipe": config.precision.recipe,
        "micro_sequences": config.batch.micro_sequences,
        "micro_batches": step_time.micro_batches(config),
        "micro_batches_in_flight": layout.micro_batches_in_flight,
        "seconds": step.total,
        "parts": _parts(step),
        "tokens_per_device_second": step.tokens_per_device_second,
        "peak_bytes": size,
        "overrides": overrides(config, base),
    }


def _parts(step: StepTime) -> dict[str, float]:
    """Seconds of a step: means over ranks of the pipeline's parts, and what follows it."""
    exposed, bubble = (
        sum(getattr(rank, part) for rank in step.ranks) / len(step.ranks)
        for part in ("exposed", "bubble")
    )
    return {
        "computation": step.pipeline - exposed - bubble,
        "exposed messages": exposed,
        "bubble": bubble,
        "optimizer": step.update,
    }


def _behind(step: StepTime, best: StepTime) -> dict[str, float]:
    """Seconds beyond the best step: in all, and by part."""
    ours, theirs = _parts(step), _parts(best)
    return {"total": step.total - best.total, **{key: ours[key] - theirs[key] for key in ours}}


def _given(
    config: Config, devices: int, machine: Machine, execution: str, best: StepTime
) -> dict[str, Any] | None:
    """Row of the config's own layout."""
    if math.prod(dataclasses.astuple(config.mesh)) != devices:
        return None
    try:
        step, size = _step(config, machine, execution), planned_bytes(config, execution)
    except ConfigError:  # a format that the chip does not multiply
        return None
    row = _row(config, config, step, size)
    over = size - room_bytes(machine.chip)
    return {**row, "over_bytes": over, "behind": _behind(step, best)}


def _no_layout(config: Config, devices: int) -> str:
    batch = config.batch
    return (
        f"no layout of {devices} devices passes the config's checks: devices must split "
        f"model.experts={config.model.experts}, batch.sequences={batch.sequences} and "
        f"batch.ramp_sequences={batch.ramp_sequences}; try a power of two, or other batch sizes"
    )
