"""Families of layouts, which differ in micro-batches, recomputation, ZeRO and precision alone.

A family whose smallest layout does not fit is left out as a whole. Fewer sequences of a
micro-batch, fewer micro-batches in flight and more recomputation never need more memory, so the
smallest is among a few members, one for each ZeRO stage and recipe.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

from deepseek_jax.config import Config


class Family(NamedTuple):
    """Mesh and schedule that the layouts of a family have in common."""

    mesh: tuple[int, ...]
    pipeline: str


def family_of(config: Config) -> Family:
    """Family of a layout."""
    pipeline = config.layout.pipeline if config.mesh.pipe > 1 else ""
    return Family(dataclasses.astuple(config.mesh), pipeline)


class Smallest:
    """The smallest layout of each family, found when it is asked for.

    Args:
      layouts: All layouts.
      planned_bytes: Function from a layout to the bytes of a device.
    """

    def __init__(self, layouts: Iterable[Config], planned_bytes: Callable[[Config], int]) -> None:
        self._planned_bytes = planned_bytes
        self._found: dict[Family, tuple[Config, int]] = {}
        self._members: dict[Family, list[Config]] = collections.defaultdict(list)
        for each in layouts:
            self._members[family_of(each)].append(each)

    def of(self, family: Family) -> tuple[Config, int]:
        """(layout, bytes of a device) of the smallest layout of a family."""
        if family not in self._found:
            fewest = min(map(_micro_batch, self._members[family]))
            smallest = [
                (self._planned_bytes(each), number, each)
                for number, each in enumerate(self._members[family])
                if each.layout.recompute == "full" and _micro_batch(each) == fewest
            ]
            size, _, config = min(smallest)
            self._found[family] = config, size
        return self._found[family]

    def least(self) -> tuple[Config, int]:
        """(layout, bytes of a device) of the smallest layout of all."""
        return min(map(self.of, self._members), key=lambda found: found[1])


def _micro_batch(config: Config) -> tuple[int, int]:
    return config.batch.micro_sequences, config.layout.micro_batches_in_flight
