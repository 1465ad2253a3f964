"""Bytes that one device sends for one layer and one micro-batch, by link.

slow: between nodes (InfiniBand); fast: inside a node (NVLink). With two hops a token is sent once
to each chosen node, and from there to the chosen GPUs of the node; results return the same way.
Numbers of copies are means of a router without preference among what its limit on groups allows.
`buffers` are the messages of this project's programs: whole buffers, with their capacity factor.
"""

import dataclasses
import math

import jax.numpy as jnp

from deepseek_jax.config import DATA_AXES, Config, buffer_slots, most_nodes
from deepseek_jax.parallel.experts import traffic
from deepseek_jax.parallel.experts.dispatch import ExchangePlan, Hop
from deepseek_jax.parallel.pipeline.schedule import Work
from deepseek_jax.precision.payload import Payload

FORWARD, INPUTS, WEIGHTS = Work.FORWARD, Work.INPUT_GRAD, Work.WEIGHT_GRAD


@dataclasses.dataclass(frozen=True)
class Message:
    """Bytes that one device sends.

    Attributes:
      name: "dispatch", "combine", or their backward forms.
      slow_bytes: Between nodes.
      fast_bytes: Inside a node.
    """

    name: str
    slow_bytes: float
    fast_bytes: float


def copies(config: Config, each_expert: bool = False) -> tuple[float, float]:
    """Mean copies of a token that leave the node, and that reach another GPU over NVLink.

    Experts of a token lie in `top_groups` of `groups` groups, each as likely as any other.

    Args:
      config: Config of the run.
      each_expert: Whether a flat all-to-all sends a copy for each expert and not for each GPU.
    """
    model, mesh = config.model, config.mesh
    over = config.layout.rules.get("experts", ())
    nodes = math.prod(getattr(mesh, axis) for axis in over if axis != "gpu")
    gpus = mesh.gpu if "gpu" in over else 1
    limited = model.groups > 1 and model.top_groups < model.groups
    if limited:
        nodes_chosen = _distinct(nodes, model.groups, model.top_groups)
        per_node = model.top_k / nodes_chosen
        gpus_in_node = gpus * (1 - (1 - 1 / gpus) ** per_node)
        gpus_chosen = nodes_chosen * gpus_in_node
    else:
        nodes_chosen = _distinct(nodes, model.experts, model.top_k)
        gpus_chosen = _distinct(nodes * gpus, model.experts, model.top_k)
    remote = nodes_chosen * (nodes - 1) / nodes
    if config.layout.dispatch == "two_hop":
        return remote, gpus_chosen * (gpus - 1) / gpus
    total = nodes * gpus
    gpus_chosen = model.top_k if each_expert else gpus_chosen
    return gpus_chosen * (nodes - 1) / nodes, gpus_chosen * (gpus - 1) / total


def _distinct(places: int, items: int, chosen: int) -> float:
    """Mean number of places among which `chosen` of `items`, spread evenly, lie."""
    if places >= items:
        return float(chosen)
    each = items // places
    missed = math.comb(items - each, chosen) / math.comb(items, chosen)
    return places * (1 - missed)


def exchanges(
    config: Config, tokens: int, each_expert: bool = False
) -> dict[Work, tuple[Message, ...]]:
    """Messages of an MoE layer's phases: tokens of mean copies, without padding.

    Tokens and gradients of results travel in `precision.dispatch`, all else in 16 bits
    (section 3.3.3). Full recomputation dispatches tokens again in backward. `each_expert`: as in
    `copies`.
    """
    over = config.layout.rules.get("experts", ())
    devices = math.prod(getattr(config.mesh, axis) for axis in over)
    if devices == 1 or config.layout.dispatch == "reference":
        return {FORWARD: (), INPUTS: (), WEIGHTS: ()}
    slow, fast = copies(config, each_expert)
    out = sum(_payload(config).bytes_out(config.model.d_model, jnp.bfloat16))
    back = config.model.d_model * _itemsize(config)

    def message(name: str, each: float) -> Message:
        return Message(name, tokens * slow * each, tokens * fast * each)

    forward: tuple[Message, ...] = (message("dispatch", out), message("combine", back))
    backward: tuple[Message, ...] = (
        message("combine backward", out),
        message("dispatch backward", back),
    )
    if config.layout.recompute == "full":
        backward = *forward, *backward
    return {FORWARD: forward, INPUTS: backward, WEIGHTS: ()}


def buffers(config: Config, tokens: int) -> dict[str, list[int]]:
    """Bytes of each hop's all-to-all in this project's programs, as `traffic.message_bytes`."""
    model, over = config.model, config.layout.rules.get("experts", ())
    two_hop = config.layout.dispatch == "two_hop"
    outer = tuple(a for a in over if not (two_hop and a == "gpu") and getattr(config.mesh, a) > 1)
    inner = ("gpu",) if two_hop and "gpu" in over and config.mesh.gpu > 1 else ()
    groups = [group for group in (outer, inner) if group]
    parts = tuple(math.prod(getattr(config.mesh, a) for a in group) for group in groups)
    *lanes, slots = buffer_slots(
        config.layout.capacity_factor, tokens, model.top_k, model.experts, parts, most_nodes(model)
    )
    hops = tuple(Hop(*hop) for hop in zip(groups, parts, lanes, strict=True))
    plan = ExchangePlan(hops, model.experts, slots, min(slots, tokens * model.top_k))
    dtype = jnp.float32 if config.precision.recipe == "float32" else jnp.bfloat16
    return traffic.message_bytes(plan, _payload(config), model.d_model, dtype, model.top_k)


def tensor_messages(
    config: Config, tokens: int, sequence_ranks: int = 1
) -> dict[Work, tuple[Message, ...]]:
    """Messages inside a layer between tensor-parallel ranks.

    Sums of attention's and the network's outputs, and of their gradients. Sequence parallelism
    gathers tokens before attention and scatters sums after it instead; backward gathers once more.
    """
    ranks = config.mesh.tensor
    if sequence_ranks > 1:
        size = (sequence_ranks - 1) * tokens * config.model.d_model * _itemsize(config)
        gathered = (Message("sequence gather", 0.0, size),)
        return {FORWARD: 2 * gathered, INPUTS: 3 * gathered, WEIGHTS: ()}
    if ranks == 1:
        return {FORWARD: (), INPUTS: (), WEIGHTS: ()}
    ring = 2 * (ranks - 1) / ranks * tokens * config.model.d_model * _itemsize(config)
    both = Message("tensor sum", 0.0, ring), Message("tensor sum", 0.0, ring)
    return {FORWARD: both, INPUTS: both, WEIGHTS: ()}


def width_messages(config: Config, tokens: int, axis: str, count: int) -> tuple[Message, ...]:
    """Gathers or scatters of the tokens of all devices that share a width over data parallelism.

    Args:
      axis: "dense_width" or "vocab".
      count: Number of such messages.
    """
    over = config.layout.rules.get(axis, ())
    others = math.prod(getattr(config.mesh, name) for name in over if name in DATA_AXES) - 1
    if not others:
        return ()
    size = others * tokens * config.model.d_model * _itemsize(config)
    return count * (Message(f"{axis} gather", 0.0, size),)


def _payload(config: Config) -> Payload:
    return Payload(fp8=config.precision.dispatch == "fp8")


def _itemsize(config: Config) -> int:
    return 4 if config.precision.recipe == "float32" else 2
