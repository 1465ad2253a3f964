"""Record of a saved step: dtype, shape and bit sum of each leaf, under a checksum of its own."""

import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.checkpoint import chunks as files
from deepseek_jax.checkpoint.chunks import Leaves

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


def bit_sums(leaves: dict[str, jax.Array]) -> list[int]:
    """Bit sum of each leaf (`chunks.bits`), which is the same for every sharding.

    Computed on the host: to compile this for the devices takes a laptop longer than a save.
    """
    sums = np.array([_local_bits(leaf) for leaf in leaves.values()], np.uint32)
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
    return sums.tolist()


def _local_bits(leaf: jax.Array) -> int:
    """Bit sum of this process's shards; one of several replicas counts."""
    parts = [np.asarray(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
    return sum(map(files.bits, parts)) % 2**32


def sums_on_disk(leaves: Leaves, names: Iterable[str]) -> Iterator[int]:
    """Bit sums of leaves on disk, each read once, a chunk at a time."""
    return (sum(map(files.bits, leaves.chunks(name))) % 2**32 for name in names)


def verify(
    names: Collection[str], sums: Callable[[Any], Iterable[int]], record: dict[str, Any]
) -> bool:
    """Compares the bit sums of leaves with the record: True, or ValueError if one differs."""
    for name, bits in zip(names, sums(names), strict=True):
        if bits != record["leaves"][name][1]:
            raise ValueError(f"{name} is not what was saved: its bits do not add up")
    return True


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON keeps it, with its checksum under `crc`."""
    text = json.dumps({key: record[key] for key in record if key != "crc"}, sort_keys=True)
    return {**json.loads(text), "crc": zlib.crc32(text.encode())}
