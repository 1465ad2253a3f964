"""Expert-parallel load balancer (EPLB): experts of each GPU, busy ones copied (section 3.4.1).

L MoE layers, E experts, R expert slots (each holds one expert's weights), R/GPUs of them on each
GPU, node by node. M tokens, K chosen experts per token, C = R - E + 1 the most copies of an expert.

Two greedy steps, each with a bound. Copies go one by one to the expert with the most load per copy:
no other choice gives a lower maximum, and no slot carries more than total / C. Slots, by falling
load, go to the GPU with the least so far: two GPUs of a node differ by one slot's load at most.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """Experts of the expert slots of every layer; without L, of one layer.

    The shapes follow from E and R alone, so that a program compiled for one placement runs with
    any other.

    Attributes:
      expert_of_slot: LR int32; slot r is on GPU r // (R / GPUs).
      slots_of_expert: LEC int32, slots of an expert in ascending order, then -1.
      copies: LE int32, copies of an expert, from 1 to C.
    """

    expert_of_slot: np.ndarray
    slots_of_expert: np.ndarray
    copies: np.ndarray


def place(load: np.ndarray, *, slots: int, groups: int, nodes: int, gpus: int) -> Placement:
    """Placement that balances each layer's load over GPUs.

    Where nodes divide the groups, all copies of a group's experts stay on one node, so that
    node-limited routing still holds. Otherwise any slot may hold any expert.

    Args:
      load: LE, tokens or share of tokens of each expert, zero or more; ties go to lower numbers.
      slots: R.
      groups: number of groups of the router, equal runs of experts.
      nodes, gpus: numbers of nodes, and of GPUs on all of them, that share a layer's experts.

    Raises:
      ConfigError: sizes do not divide, or the load is not finite and non-negative.
    """
    load = np.asarray(load, np.float64)
    _check(load, slots, groups, nodes, gpus)
    if groups % nodes:
        groups = nodes = 1
    held = [_expert_of_slot(layer, slots, groups, nodes, gpus) for layer in load]
    expert_of_slot = np.array(held, np.int32).reshape(-1, slots)
    layers, experts = load.shape
    slots_of_expert = np.full((layers, experts, slots - experts + 1), -1, np.int32)
    copies = np.zeros((layers, experts), np.int32)
    for slot, expert in enumerate(expert_of_slot.T):
        every = np.arange(layers), expert
        slots_of_expert[(*every, copies[every])] = slot
        copies[every] += 1
    return Placement(expert_of_slot, slots_of_expert, copies)


def slots_for(experts: jax.Array, placement: Placement, first: jax.Array | int = 0) -> jax.Array:
    """Expert slot of each token's choice; all copies of an expert compute the same.

    The tokens of an expert take its copies round robin. Only tokens that chose the expert count:
    counting all rows would favour one copy where, say, every second row chooses it.

    Args:
      experts: MK int32.
      placement: placement of one layer.
      first: copy that the first token takes. It differs by device, so that the odd tokens of all
        devices do not go to the same copy.

    Returns:
      MK int32 in [0, R): each copy gets n/copies of an expert's n tokens, rounded down or up.
    """
    chosen = experts.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    ordered = chosen[order]
    nth = jnp.arange(chosen.shape[0]) - jnp.searchsorted(ordered, ordered)
    nth = jnp.zeros_like(nth).at[order].set(nth, unique_indices=True).reshape(experts.shape)
    copy = (nth + first) % jnp.asarray(placement.copies)[experts]
    return jnp.asarray(placement.slots_of_expert)[experts, copy]


def _expert_of_slot(
    load: np.ndarray, slots: int, groups: int, nodes: int, gpus: int
) -> list[np.ndarray]:
    """Assigns groups to nodes, replicates hot experts per node, and packs slots onto GPUs."""
    members = np.arange(load.size).reshape(groups, -1)
    held: list[np.ndarray] = []
    for here in _pack(load[members].sum(1), nodes):
        experts = members[here].reshape(-1)
        copied = _replicate(load[experts], slots // nodes)
        share = load[experts] / np.bincount(copied)
        held += [experts[copied[gpu]] for gpu in _pack(share[copied], gpus // nodes)]
    return held


def _replicate(load: np.ndarray, slots: int) -> np.ndarray:
    """Item of each slot: every item once, then repeatedly the one with the most load per copy."""
    copies = np.ones(load.size)
    items = list(range(load.size))
    while len(items) < slots:
        items.append(int(np.argmax(load / copies)))
        copies[items[-1]] += 1
    return np.array(items)


def _pack(load: np.ndarray, packs: int) -> np.ndarray:
    """Items of each pack, (packs, items / packs).

    Greedy: the heaviest item first, into the lightest pack that is not full.
    """
    room = load.size // packs
    if room == 1:
        return np.arange(packs)[:, None]
    held: list[list[int]] = [[] for _ in range(packs)]
    total = np.zeros(packs)
    for item in np.argsort(-load, kind="stable"):
        pack = int(np.argmin(total))
        held[pack].append(item)
        total[pack] = total[pack] + load[item] if len(held[pack]) < room else np.inf
    return np.array(held)


def _check(load: np.ndarray, slots: int, groups: int, nodes: int, gpus: int) -> None:
    if load.ndim != 2 or not load.size or not np.all((load >= 0) & (load < np.inf)):
        raise ConfigError(
            f"load of shape {load.shape} is not a finite number from 0 on for each [layer, expert]"
        )
    experts = load.shape[1]
    sizes = {"slots": slots, "groups": groups, "nodes": nodes, "gpus": gpus}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name}={size} must be 1 or more")
    if gpus % nodes:
        raise ConfigError(
            f"gpus={gpus} do not divide among nodes={nodes}; set gpus to a multiple of nodes"
        )
    if experts % groups:
        raise ConfigError(
            f"{experts} experts do not divide into groups={groups}; set groups to a divisor"
        )
    least = -(-experts // gpus) * gpus
    if slots % gpus or slots < experts:
        raise ConfigError(
            f"slots={slots} do not give each of {gpus} GPUs as many and each of {experts} experts "
            f"one; set slots to a multiple of {gpus} from {least} on"
        )
