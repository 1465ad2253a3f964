"""Ablations of a config: step time, memory and price with each idea of the report switched off.

Each row changes one thing, and keeps the number of devices, the batch and all else. Times are those
of asynchronous ranks, since ideas are compared and not this project's executor. With a skewed
router, one device has `SKEW` times the mean rows of experts in every layer, and all others wait.
Tensor parallelism is Megatron's with sequence parallelism: ranks share the tokens of a sequence.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from deepseek_jax.config import Config, ConfigError, check
from deepseek_jax.plan import machine_lookup, step_time
from deepseek_jax.plan.attention_kinds import cache_bytes, extra_bytes
from deepseek_jax.plan.changed_config import replace
from deepseek_jax.plan.chunk_time import ChunkTimes
from deepseek_jax.plan.cost import run_cost
from deepseek_jax.plan.machine import Machine
from deepseek_jax.plan.peak import live_layers, peak_bytes, room_bytes
from deepseek_jax.plan.update_time import update_seconds

SKEW = 2.0
TENSOR = 4  # ranks of tensor parallelism, where it is switched on
EXECUTION = "asynchronous"


@dataclasses.dataclass(frozen=True)
class SwitchedOff:
    """An idea switched off.

    Attributes:
      answer: Idea of the base.
      instead: Its replacement.
      effect: Physical effect of the replacement, for a reader of the row.
      change: Config without the idea; the same config if it does not have the idea.
      attention: "mla", "mha" or "gqa".
      imbalance: Rows of experts of the fullest device over the mean.
      sequence_ranks: Ranks of tensor parallelism with sequence parallelism.
    """

    answer: str
    instead: str
    effect: str
    change: Callable[[Config], Config] = lambda config: config
    attention: str = "mla"
    imbalance: float = 1.0
    sequence_ranks: int = 1


def _any_node(config: Config) -> Config:
    return replace(config, "model", top_groups=config.model.groups)


def _flat(config: Config) -> Config:
    hops = config.layout.dispatch == "two_hop" and config.mesh.node > 1
    return replace(config, "layout", dispatch="flat") if hops else config


def _one_node(config: Config) -> Config:
    mesh = config.mesh
    return replace(config, "mesh", replica=mesh.replica * mesh.node, node=1)


def _tensor(config: Config) -> Config:
    """Ranks of tensor parallelism in the place of data-parallel GPUs of a node."""
    mesh, batch = config.mesh, config.batch
    if mesh.tensor > 1 or mesh.gpu % TENSOR or batch.micro_sequences % TENSOR:
        return config
    config = replace(config, "mesh", gpu=mesh.gpu // TENSOR, tensor=TENSOR)
    return replace(config, "batch", micro_sequences=batch.micro_sequences // TENSOR)


def _schedule(kind: str) -> Callable[[Config], Config]:
    """Schedule that runs no matmul beside messages, so that matmuls get all multiprocessors."""

    def change(config: Config) -> Config:
        if config.mesh.pipe == 1 or not config.layout.pipeline.startswith("dualpipe"):
            return config
        changed = dict(pipeline=kind, defer_weight_gradients=False, communication_sms=0)
        return replace(config, "layout", **changed)

    return change


def _bfloat16(config: Config) -> Config:
    if config.precision.recipe != "fp8":
        return config
    return replace(config, "precision", recipe="bfloat16", dispatch="compute")


def _recompute(policy: str) -> Callable[[Config], Config]:
    return lambda config: replace(config, "layout", recompute=policy)


def _moments(config: Config) -> Config:
    return replace(config, "optimizer", moments="float32")


def _skewed(config: Config) -> Config:
    factor = SKEW * config.layout.capacity_factor  # buffers for the rows of the fullest device
    return replace(config, "layout", capacity_factor=factor)


def _no_mtp(config: Config) -> Config:
    return replace(config, "model", mtp_depth=0)


BASE = SwitchedOff("base", "", "the config as it is")
ABLATIONS = (
    SwitchedOff("MLA", "MHA", "each head keeps its own keys and values", attention="mha"),
    SwitchedOff("MLA", "GQA, 8 key heads", "heads share keys and values", attention="gqa"),
    SwitchedOff("node-limited routing", "any node", "a token is sent to more nodes", _any_node),
    SwitchedOff("two-hop dispatch", "flat", "a copy for each GPU crosses InfiniBand", _flat),
    SwitchedOff("experts over nodes", "one node", "NVLink alone; more experts on a GPU", _one_node),
    SwitchedOff(
        "no tensor parallelism", f"{TENSOR} ranks", "sequences gathered over NVLink in each layer",
        _tensor, sequence_ranks=TENSOR,
    ),
    SwitchedOff("DualPipe", "1F1B", "messages wait; all SMs for matmuls", _schedule("1f1b")),
    SwitchedOff("DualPipe", "zero bubble", "the same with fewer bubbles", _schedule("zb1p")),
    SwitchedOff("FP8", "BF16", "matmuls at half the peak, messages twice as long", _bfloat16),
    SwitchedOff("recomputation", "none", "tokens kept at experts, and scores", _recompute("none")),
    SwitchedOff("recomputation", "full", "forward runs twice, with messages", _recompute("full")),
    SwitchedOff("BF16 moments", "FP32", "twice the bytes of Adam's moments", _moments),
    SwitchedOff(
        "balanced router", f"skewed {SKEW:g} x", "all wait for the fullest GPU",
        _skewed, imbalance=SKEW,
    ),
    SwitchedOff("MTP", "off", "one prediction of each token", _no_mtp),
)  # fmt: skip


def compare(config: Config, machines: Sequence[Machine]) -> dict[str, Any]:
    """Compares a config with its ablations on each machine.

    Args:
      config: Config of the run, whose mesh has no -1.
      machines: Machines, each with another name.

    Returns:
      Dictionary with stable keys. "rows" has the base first; a row has "problem", why it cannot be
      run on any machine or None, and "chips", its figures by the machine's name, each None where it
      cannot be computed. Those have a "problem" of their own, such as memory that does not fit.

    Raises:
      ConfigError: The base cannot be timed on a machine.
    """
    named = {machine.chip.name: machine for machine in machines}
    base = {name: _figures(BASE, config, machine) for name, machine in named.items()}
    rows = [_row(BASE, config, base)]
    for ablation in ABLATIONS:
        found = {name: _or_problem(ablation, config, m) for name, m in named.items()}
        for name, figures in found.items():
            if figures["seconds"] is not None:
                figures["change"] = figures["seconds"] / base[name]["seconds"] - 1
                figures["peak_change"] = figures["peak_bytes"] - base[name]["peak_bytes"]
        rows.append(_row(ablation, config, found))
    return {
        "devices": math.prod(dataclasses.astuple(config.mesh)),
        "tokens": config.schedule.tokens,
        "execution": EXECUTION,
        "skew": SKEW,
        "machines": {name: _machine(machine) for name, machine in named.items()},
        "rows": rows,
    }


def _machine(machine: Machine) -> dict[str, Any]:
    return {
        "room_bytes": room_bytes(machine.chip),
        "inside_bytes_per_s": machine.network.inside_bytes_per_s,
        "between_bytes_per_s": machine.network.between_bytes_per_s,
        "dollars_per_hour": machine.chip.dollars_per_hour,
    }


def _row(ablation: SwitchedOff, config: Config, chips: dict[str, Any]) -> dict[str, Any]:
    return {
        "answer": ablation.answer,
        "instead": ablation.instead,
        "effect": ablation.effect,
        "cache_bytes_per_token": cache_bytes(config.model, ablation.attention),
        "problem": _problem(ablation, config),
        "chips": chips,
    }


def _problem(ablation: SwitchedOff, config: Config) -> str | None:
    """Reason why this project does not run a row."""
    changed = ablation.change(config)
    if ablation is not BASE and changed == config and ablation.attention == "mla":
        return f"the config has no {ablation.answer} to switch off"
    if changed.layout.pipeline == "zb1p":
        return "no executor of this project runs the schedule ZB1P"
    try:
        check(changed)
    except ConfigError as error:
        return str(error)
    return None


_NOTHING: dict[str, Any] = dict.fromkeys(
    (
        "seconds", "change", "exposed", "bubble", "peak_bytes", "peak_change", "fits",
        "tokens_per_device_second", "device_hours", "dollars", "problem",
    )
)  # fmt: skip


def _or_problem(ablation: SwitchedOff, config: Config, machine: Machine) -> dict[str, Any]:
    if ablation.change(config) == config and ablation.attention == "mla":
        return dict(_NOTHING)
    try:
        return _figures(ablation, config, machine)
    except ConfigError as error:
        return {**_NOTHING, "problem": str(error)}


def _figures(ablation: SwitchedOff, config: Config, machine: Machine) -> dict[str, Any]:
    """Figures of a row on a machine; the bubble and exposed messages of the rank with the most."""
    changed = ablation.change(config)
    machine = machine_lookup.with_messages(machine, changed)
    stored = _line_of_stages(changed)
    step = step_time.step_time(_chunks(ablation, changed, machine), EXECUTION)
    update = update_seconds(stored, machine, ablation.attention)
    step = dataclasses.replace(step, update=update)
    cost = run_cost(config, machine, step)
    peak = peak_bytes(stored, EXECUTION)
    if ablation.attention != "mla":
        peak += extra_bytes(stored, ablation.attention, live_layers(stored, EXECUTION))
    over = peak - room_bytes(machine.chip)
    return {
        **_NOTHING,
        "seconds": step.total,
        "change": 0.0,
        "exposed": max(rank.exposed for rank in step.ranks),
        "bubble": max(rank.bubble for rank in step.ranks),
        "peak_bytes": peak,
        "peak_change": 0,
        "fits": over <= 0,
        "tokens_per_device_second": cost.tokens_per_device_second,
        "device_hours": cost.device_hours,
        "dollars": cost.dollars,
    }


def _chunks(ablation: SwitchedOff, changed: Config, machine: Machine) -> ChunkTimes:
    """Times of chunks; sequence-parallel ranks are timed as devices with a part of a sequence."""
    ranks, mesh = ablation.sequence_ranks, changed.mesh
    if ranks > 1:
        changed = replace(changed, "mesh", gpu=mesh.gpu * ranks, tensor=mesh.tensor // ranks)
    chunks = step_time.times(
        changed, machine, attention=ablation.attention, imbalance=ablation.imbalance
    )
    shape = dataclasses.replace(chunks.shape, sequence_ranks=ranks)
    return dataclasses.replace(chunks, shape=shape)


def _line_of_stages(config: Config) -> Config:
    """The config as memory knows it: ZB1P, which is not executed, holds the stages of 1F1B."""
    if config.layout.pipeline != "zb1p":
        return config
    return replace(config, "layout", pipeline="1f1b")
