"""Seconds of the optimizer, and of the messages of gradients and weights around it.

ZeRO: gradients are summed to their owners, in float32, and the new weights gathered from them, once
per step, or with ZeRO-3 the weights of each layer in forward and backward of each micro-batch.
Nothing of it is assumed to be hidden.
"""

import math

from deepseek_jax.config import DATA_AXES, Config
from deepseek_jax.model.count import weights
from deepseek_jax.parallel import mesh
from deepseek_jax.plan.attention_kinds import bytes_per_weight, extra_weights
from deepseek_jax.plan.machine import Machine
from deepseek_jax.plan.memory import memory
from deepseek_jax.precision.recipes import recipe


def update_seconds(config: Config, machine: Machine, attention: str = "mla") -> float:
    """Seconds after the last backward: reduction, AdamW, and the gathering of new weights.

    Args:
      attention: "mla", or "mha" or "gqa", whose layers have other weights.
    """
    used, each = memory(config), bytes_per_weight(config)
    more = extra_weights(config, attention)
    # AdamW reads and writes master and moments, and reads the gradient.
    masters = used.masters + more * each.masters
    moved = 3 * masters + 2 * (used.moments + more * each.moments)
    update = moved / (machine.efficiency.streaming * machine.chip.hbm_bytes_per_s)
    if config.layout.zero == 3 and config.mesh.pipe == 1:
        return update
    gradients = used.gradients + more * each.gradients
    owned = masters / gradients if gradients else 1.0
    weights_for_compute = used.compute_weights + more * each.prepared
    reduced, gathered = max(0.0, gradients - masters), weights_for_compute * max(0.0, 1 - owned)
    return update + (reduced + gathered) / _link(config, machine)


def weight_messages_seconds(config: Config, machine: Machine) -> float:
    """Seconds per micro-batch in which ZeRO-3 gathers weights twice and sums their gradients."""
    if config.layout.zero != 3:
        return 0.0
    layout, gathered, reduced = mesh.layout(config), 0.0, 0.0
    prepared_bytes = recipe(config.precision.recipe).prepared_bytes
    for weight in weights(config.model):
        mine = math.prod(layout.local(layout.storage(weight.axes, weight.shape), weight.shape))
        shape = layout.local(layout.spec(weight.axes), weight.shape)
        whole = math.prod(shape)
        if weight.trained and whole != mine:
            size = prepared_bytes(shape, sensitive=weight.sensitive, linear=weight.linear(shape))
            gathered += size * (1 - mine / whole)
            reduced += 4 * (whole - mine)
    return (2 * gathered + reduced) / _link(config, machine)


def _link(config: Config, machine: Machine) -> float:
    """Bytes/s of the slowest link among data-parallel devices and pipeline ranks."""
    sizes = config.mesh
    crossing = math.prod(getattr(sizes, axis) for axis in DATA_AXES if axis != "gpu") * sizes.pipe
    if crossing > 1:
        return machine.network.between_bytes_per_s
    return machine.network.inside_bytes_per_s
