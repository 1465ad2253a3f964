"""Record of a saved step: dtype, shape and bit sum of each leaf, under a checksum of its own."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.checkpoint import chunks as files
from deepseek_jax.checkpoint.chunks import Leaves
from deepseek_jax.config import ConfigError

PyTree = Any


def named(tree: PyTree) -> dict[str, Any]:
    """Leaves by dotted path, in the tree's order: containers may change class between versions."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two leaves of the state have the same dotted path")
    return named


def describe(leaf: Any) -> str:
    """Dtype and shape of a leaf, as float32[4, 8]."""
    return f"{leaf.dtype.name}{list(leaf.shape)}"


class NotFiniteLeaves(ValueError):
    """A state with NaN or infinite values; the message names the leaves that hold some."""


@dataclasses.dataclass(frozen=True)
class Look:
    """Findings of one look at a leaf's values.

    Attributes:
      bits: bit sum (`chunks.bits`), which is the same for every sharding.
      finite: whether no value is NaN or infinite.
    """

    bits: int
    finite: bool


def look(leaves: dict[str, jax.Array]) -> list[Look]:
    """Looks at each leaf, in all processes.

    Computed on the host: to compile this for the devices takes a laptop longer than a save.
    """
    local = np.array([_local(leaf) for leaf in leaves.values()], np.uint32).reshape(-1, 2)
    if jax.process_count() > 1:
        local = multihost_utils.process_allgather(local).sum(0, dtype=np.uint32)
    return [Look(int(bits), not bad) for bits, bad in local]


def _local(leaf: jax.Array) -> tuple[int, int]:
    """Bit sum, and number of parts that are not finite, of this process's shards.

    One of several replicas counts.
    """
    parts = [np.asarray(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
    return sum(map(files.bits, parts)) % 2**32, sum(not files.finite(part) for part in parts)


def look_on_disk(leaves: Leaves, names: Iterable[str]) -> Iterator[Look]:
    """Looks at leaves on disk, each read once, a chunk at a time."""
    for name in names:
        bits, finite = 0, True
        for chunk in leaves.chunks(name):
            bits, finite = bits + files.bits(chunk), finite and files.finite(chunk)
        yield Look(bits % 2**32, finite)


def require_finite(names: Iterable[str], looks: Iterable[Look]) -> None:
    """Raises NotFiniteLeaves where a leaf is not."""
    bad = [name for name, found in zip(names, looks, strict=True) if not found.finite]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NotFiniteLeaves(f"{', '.join(bad[:3])}{more}")


def verify(
    names: Collection[str], looks: Callable[[Any], Iterable[Look]], record: dict[str, Any]
) -> bool:
    """Compares leaves with the record: True, or ValueError if one differs or is not finite."""
    found = []
    for name, seen in zip(names, looks(names), strict=True):
        if seen.bits != record["leaves"][name][1]:
            raise ValueError(f"{name} is not what was saved: its bits do not add up")
        found.append(seen)
    require_finite(names, found)
    return True


def compare(
    step: Path, record: dict[str, Any], wanted: dict[str, Any], others: Collection[str]
) -> None:
    """Raises ConfigError, in one line where orbax has pages, for a step of another model.

    Args:
      step: its folder.
      others: leaves that the step may hold although they are not wanted.
    """
    found = {name: kind for name, (kind, _) in record["leaves"].items()}
    expected = {name: describe(leaf) for name, leaf in wanted.items()}
    differ = [
        f"{name} (found {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')})"
        for name in {**expected, **found}
        if found.get(name) != expected.get(name) and (name in expected or name not in others)
    ]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ConfigError(
            f"{step} holds another model: {', '.join(differ[:3])}{more}; "
            "choose another workdir, or the config that wrote this one"
        )


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON keeps it, with its checksum under `crc`."""
    text = json.dumps({key: record[key] for key in record if key != "crc"}, sort_keys=True)
    return {**json.loads(text), "crc": zlib.crc32(text.encode())}
