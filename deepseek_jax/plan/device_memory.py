"""Peak memory of a training step on one device, by item: arithmetic, without devices.

All devices run one program, so all ranks of a pipeline need as much. State, weights, gradients and
kept activations follow from shapes and placements (`memory.py`, `activations.py`). Temporaries of
the compiler are a stated model of what is live at the worst moment (`temporaries.py`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.model import remat
from deepseek_jax.model.count import weights
from deepseek_jax.parallel import mesh
from deepseek_jax.parallel.pipeline import schedule
from deepseek_jax.parallel.pipeline.lockstep import lockstep
from deepseek_jax.parallel.pipeline.one_f_one_b import LinearStages, OneFOneB
from deepseek_jax.parallel.pipeline.stage_assignment import assign_layers, stage_map
from deepseek_jax.plan import residual_trace, temporaries
from deepseek_jax.plan.activations import DeviceShapes, device_shapes, layer_residuals
from deepseek_jax.plan.memory import Memory, memory
from deepseek_jax.precision.recipes import recipe
from deepseek_jax.train.token_schedule import most_micro_batches

GIB = 2**30
RECIPES = ("bfloat16", "fp8")

# Items of device memory, in the order of tables and pictures.
MASTERS, MOMENTS = "masters", "moments"
WEIGHTS, GRADIENTS = "weights for compute", "gradients"
ACTIVATIONS, DEFERRED = "activations", "deferred weight gradients"
MESSAGES, TEMPORARIES = "message buffers", "temporaries"
ITEMS = (
    MASTERS, MOMENTS, WEIGHTS, GRADIENTS, ACTIVATIONS, DEFERRED, MESSAGES, TEMPORARIES,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a training step on one device at its worst moment, estimated.

    Attributes:
      items: Name, one of ITEMS -> bytes of device memory.
      moment: Worst moment, in words.
      kept_per_layer: Bytes that an MoE layer keeps of one micro-batch, by `activations.KINDS`.
      held: Micro-batches whose activations are kept at once.
      layers_held: Layers whose activations each of them keeps.
      ema_host: Bytes of the average of the weights, in host memory.
    """

    items: Mapping[str, int]
    moment: str
    kept_per_layer: Mapping[str, int]
    held: int
    layers_held: int
    ema_host: int

    @property
    def peak(self) -> int:
        """Bytes of device memory at the worst moment."""
        return sum(self.items.values())

    @property
    def largest(self) -> str:
        """Name of the largest item."""
        return max(self.items, key=lambda name: self.items[name])


def device_memory(config: Config) -> DeviceMemory:
    """Estimates the peak memory of a training step on one device, without cuDNN's workspace.

    Args:
      config: Config of the run, whose mesh has no -1.

    Raises:
      ConfigError: Ranks of a pipeline, layers of its stages, or buffers, that do not fit.
    """
    shapes, fixed = device_shapes(config), memory(config)
    staged = config.mesh.pipe > 1
    moments = _staged_moments(config, shapes, fixed) if staged else _moments(config, shapes, fixed)
    name, items = max(moments.items(), key=lambda each: sum(each[1].values()))
    state = {
        MASTERS: fixed.masters + fixed.router_bias,
        MOMENTS: fixed.moments + fixed.counters,
    }
    held, layers = _held(config)
    return DeviceMemory(
        items={key: {**state, **items}.get(key, 0) for key in ITEMS},
        moment=name,
        kept_per_layer=_of_one(config, layer_residuals(config)),
        held=held,
        layers_held=layers,
        ema_host=fixed.ema_host,
    )


def _of_one(config: Config, kept: Mapping[str, int]) -> Mapping[str, int]:
    """Bytes of one of the micro-batches in flight."""
    many = 1 if config.mesh.pipe > 1 else config.layout.micro_batches_in_flight
    return {kind: size // many for kind, size in kept.items()}


def _held(config: Config) -> tuple[int, int]:
    """(micro-batches whose activations a device keeps at once, layers of each)."""
    if config.mesh.pipe > 1:
        return kept_slots(config)["kept"], assign_layers(config).slots
    in_flight = config.layout.micro_batches_in_flight
    return min(in_flight, most_micro_batches(config.batch)), config.model.layers


def kept_slots(config: Config) -> Mapping[str, int]:
    """Slots of the pools of a pipeline's executor: "kept", "x", "d_y", and "later" if any."""
    held = stage_map(config)
    if isinstance(held, LinearStages):  # one input and one gradient travel
        return {"kept": OneFOneB(held.ranks, skip=False).slots, "x": 1, "d_y": 1}
    layout = config.layout
    return _lockstep_slots(layout.pipeline, config.mesh.pipe, layout.defer_weight_gradients)


@functools.lru_cache(maxsize=64)
def _lockstep_slots(kind: str, ranks: int, defer: bool) -> Mapping[str, int]:
    """Slots of the fewest micro-batches; no pool grows with their number."""
    return lockstep(schedule.BY_NAME[kind](ranks, 2 * ranks), defer).slots


def _moments(
    config: Config, shapes: DeviceShapes, fixed: Memory
) -> Mapping[str, Mapping[str, int]]:
    """Items besides masters and moments at the moments that can be the worst, no pipeline."""
    model = config.model
    several = most_micro_batches(config.batch) > config.layout.micro_batches_in_flight
    kept = model.moe_layers * sum(layer_residuals(config).values()) if model.moe_layers else 0
    if model.dense_layers:
        kept += model.dense_layers * sum(layer_residuals(config, dense=True).values())
    made = gradients_in_backward(config)
    sums = fixed.gradients if several else 0
    of_module = sum(layer_residuals(config).values()) if model.mtp_depth else 0
    compute = fixed.compute_weights + fixed.gathered_layer
    rows = temporaries.messages(shapes)
    return {
        "backward of the layers": {
            WEIGHTS: compute,
            GRADIENTS: sums + made["moe_layers"] + made["dense_layers"],
            ACTIVATIONS: kept,
            MESSAGES: rows,
            TEMPORARIES: temporaries.of_layer(config, shapes) - rows,
        },
        "backward of the MTP modules": {
            WEIGHTS: compute,
            GRADIENTS: sums + made["mtp"],
            ACTIVATIONS: kept + model.mtp_depth * of_module,
            MESSAGES: rows,
            TEMPORARIES: temporaries.of_layer(config, shapes) - rows,
        },
        "the head": {
            WEIGHTS: compute,
            GRADIENTS: sums,
            ACTIVATIONS: kept + model.mtp_depth * of_module,
            TEMPORARIES: temporaries.of_head(config, shapes),
        },
        "the optimizer": {GRADIENTS: fixed.gradients + fixed.reduced_gradients},
    }


def gradients_in_backward(config: Config) -> Mapping[str, int]:
    """Bytes of the gradients of one micro-batch on one device, by part of the model.

    A scan over layers makes them as a stack. They have the dtype of the prepared weight, and
    float32 where it is sensitive or in FP8.
    """
    layout, chosen = mesh.layout(config), recipe(config.precision.recipe)
    found = dict.fromkeys(("embedding", "dense_layers", "moe_layers", "norm", "head", "mtp"), 0)
    for weight in weights(config.model):
        if not weight.trained:
            continue
        spec = layout.storage if layout.zero == 3 else lambda axes, _: layout.spec(axes)
        shape = layout.local(spec(weight.axes, weight.shape), weight.shape)
        wide = weight.sensitive or (chosen.keeps_blocks and weight.linear(shape) is not None)
        size = 4 if wide else chosen.activation_dtype.itemsize
        found[weight.path.split(".")[0]] += size * math.prod(shape)
    return found


def _staged_moments(
    config: Config, shapes: DeviceShapes, fixed: Memory
) -> Mapping[str, Mapping[str, int]]:
    """Items besides masters and moments at the moments that can be the worst, in a pipeline."""
    slots, layers = kept_slots(config), assign_layers(config).slots
    layer = sum(layer_residuals(config).values())
    without = layer - sum(layer_residuals(config, dense=True).values())
    chunk = layers * layer - _fewest_dense_slots(config) * without
    passing = (slots["x"] + slots["d_y"]) * shapes.activation * shapes.tokens * shapes.model.d_model
    deferred = slots["later"] * layers * _deferred_bytes(config) if "later" in slots else 0
    carried = {
        WEIGHTS: fixed.compute_weights,
        GRADIENTS: fixed.gradients,
        ACTIVATIONS: slots["kept"] * chunk + passing,
        DEFERRED: deferred,
    }
    rows = temporaries.messages(shapes)
    space = temporaries.space_between(layers, _layer_gradients(config))
    tick = temporaries.of_tick(config, shapes, chunk, space)
    module = config.model.mtp_depth * _kept_at_the_end(config)
    end = temporaries.of_last_stage(config, shapes, module, space)
    return {
        "a tick": {**carried, MESSAGES: rows, TEMPORARIES: tick - rows},
        "the last stage": {**carried, MESSAGES: rows, TEMPORARIES: end - rows},
        "the optimizer": {GRADIENTS: fixed.gradients + fixed.reduced_gradients},
    }


def _kept_at_the_end(config: Config) -> int:
    """Bytes that an MTP module of the last stage keeps within its tick; `remat.within_tick`."""
    policy = config.layout.recompute
    layout = dataclasses.replace(config.layout, recompute="none" if policy == "none" else "report")
    return sum(layer_residuals(dataclasses.replace(config, layout=layout)).values())


def _layer_gradients(config: Config) -> int:
    """Bytes of the gradients of one MoE layer's weights in float32 on one device."""
    layout, numbers = mesh.layout(config), 0
    for weight in weights(config.model):
        if weight.trained and weight.path.startswith("moe_layers."):
            numbers += math.prod(layout.local(layout.spec(weight.axes), weight.shape))
    return 4 * numbers // max(config.model.moe_layers, 1)


def _fewest_dense_slots(config: Config) -> int:
    """Slots of a chunk that may have a dense layer, in the chunk with the fewest of them."""
    layers = assign_layers(config).layers  # [rank, chunk, slot]
    dense = ((layers >= 0) & (layers < config.model.dense_layers)).any(0)
    return int(dense.sum(-1).min())


def _deferred_bytes(config: Config) -> int:
    """Bytes that a layer keeps for the weight gradients that it defers; traced."""
    return sum(map(residual_trace.nbytes, residual_trace.of_deferred(config)))


def by_recipe(
    config: Config,
    recipes: Sequence[str] = RECIPES,
    policies: Sequence[str] = tuple(remat.BY_NAME),
) -> Mapping[tuple[str, str], DeviceMemory]:
    """Estimates the peak memory for each recipe and recompute policy.

    Args:
      config: Config of the run, whose mesh has no -1.
      recipes: Values of precision.recipe.
      policies: Values of layout.recompute. "none" without a pipeline takes seconds.

    Returns:
      (recipe, policy) -> memory.
    """
    found = {}
    for name, policy in itertools.product(recipes, policies):
        precision = dataclasses.replace(config.precision, recipe=name)
        layout = dataclasses.replace(config.layout, recompute=policy)
        changed = dataclasses.replace(config, precision=precision, layout=layout)
        found[name, policy] = device_memory(changed)
    return found


def rows(memories: Mapping[tuple[str, str], DeviceMemory]) -> list[dict[str, Any]]:
    """Rows of a table in GiB: recipe, policy, each item, peak, the largest item, host memory."""
    return [
        {
            "recipe": name,
            "recompute": policy,
            **{item: size / GIB for item, size in memory.items.items()},
            "peak": memory.peak / GIB,
            "largest": memory.largest,
            "EMA, host": memory.ema_host / GIB,
        }
        for (name, policy), memory in memories.items()
    ]
