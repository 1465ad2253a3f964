"""Least memory of a run, held against that of this machine before anything is allocated.

A run is refused only where it cannot succeed: what is counted must exist at the same time. `plan`
prints the estimate of all weights and gradients; a run needs more than this bound.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config, ConfigError, ModelConfig
from deepseek_jax.hardware import machine_memory
from deepseek_jax.model.count import weights
from deepseek_jax.model.params import Weight
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.precision.recipes import Recipe, recipe

FLOAT32 = INT32 = 4  # bytes

HOST, DEVICE = "host memory", "memory of a device"

_SIZES = (
    "layers", "d_model", "vocab", "experts", "d_expert", "shared_experts", "d_dense", "heads",
    "d_nope", "d_rope", "d_value", "kv_latent", "q_latent",
)  # fmt: skip


_WIDTHS = ("d_nope", "d_rope", "d_value")


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes that must exist at some time of a run, and the config keys that they grow with.

    Attributes:
      name: what the bytes are.
      bytes: their number.
      keys: gives dotted key -> value, the most important first; called for a message only.
    """

    name: str
    bytes: int
    keys: Callable[[], Mapping[str, int]]


def check_training(config: Config) -> None:
    """Checks the least memory of a training run against this machine's.

    Args:
      config: config of the run, whose mesh has no -1.

    Raises:
      ConfigError: the run does not fit; the message names its largest sizes.
    """
    layout, devices = meshes.layout(config), jax.local_device_count()
    held, activations = state(config, layout), _activations(config, layout)
    average = _average(config, layout)
    on_host = [_times(average, devices), _batch(config)]
    if jax.default_backend() == "cpu":  # its devices share the memory of the host
        _check([_times(held, devices), activations, *on_host], machine_memory.host_bytes(), HOST)
    else:
        _check([held, activations], machine_memory.device_bytes(), DEVICE)
        _check(on_host, machine_memory.host_bytes(), HOST)


def check_weights(
    model: ModelConfig,
    stored: Recipe,
    layout: Layout | None = None,
    blocks: Container[str] = frozenset(),
) -> None:
    """Checks the bytes of a model's weights alone, as `stored` keeps them, against this machine.

    Args:
      layout: their placement; None for the default device.
      blocks: paths of the weights that stay FP8 blocks, one byte each without their scales.

    Raises:
      ConfigError: they do not fit; the message names the largest sizes.
    """

    def size(weight: Weight) -> int:
        return 1 if weight.path in blocks else weight.stored_dtype(stored).itemsize

    def need(model: ModelConfig) -> int:
        return sum(size(weight) * _held(weight, layout) for weight in weights(model))

    part = Part("weights", need(model), lambda: _largest(model, need))
    if jax.default_backend() == "cpu":
        devices = 1 if layout is None else jax.local_device_count()
        _check([_times(part, devices)], machine_memory.host_bytes(), HOST)
    else:
        _check([part], machine_memory.device_bytes(), DEVICE)


def check_compiled(compiled: Any, config: Config) -> None:
    """Checks the temporaries of a compiled step, which are one allocation, before it runs.

    Raises:
      ConfigError: they are more than the memory of this machine.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:  # not every backend has one
        return
    on_cpu = jax.default_backend() == "cpu"
    there = machine_memory.host_bytes() if on_cpu else machine_memory.device_bytes()
    batch = config.batch
    keys = {"batch.micro_sequences": batch.micro_sequences, "batch.length": batch.length}
    part = Part("temporaries of a step", analysis.temp_size_in_bytes, lambda: keys)
    _check([part], there, HOST if on_cpu else DEVICE)


def _check(parts: list[Part], there: int | None, where: str) -> None:
    """Raises ConfigError where `parts` together are more than the bytes that are there."""
    need = sum(part.bytes for part in parts)
    if there is None or need <= there:
        return
    most = max(parts, key=lambda part: part.bytes)
    sizes = ", ".join(f"{key}={value}" for key, value in list(most.keys().items())[:3])
    text = machine_memory.text
    raise ConfigError(
        f"{sizes}: at least {text(need)} of {where} are needed ({text(most.bytes)} for "
        f"{most.name}), and there are {text(there)}; lower a size, or use more devices"
    )


def _times(part: Part, count: int) -> Part:
    return dataclasses.replace(part, bytes=count * part.bytes)


def _held(weight: Weight, layout: Layout | None) -> int:
    """Numbers of a parameter that one device holds between steps."""
    if layout is None:
        return math.prod(weight.shape)
    spec = layout.storage if weight.trained else lambda axes, _: layout.spec(axes)
    return math.prod(layout.local(spec(weight.axes, weight.shape), weight.shape))


def state(config: Config, layout: Layout) -> Part:
    """Masters, moments and the gradients of an update, which clipping needs all at once."""
    moment, muon = jnp.dtype(config.optimizer.moments).itemsize, config.optimizer.name == "muon"

    def each(weight: Weight) -> int:
        if not weight.trained:
            return FLOAT32
        return 2 * FLOAT32 + (1 if muon and weight.roles else 2) * moment

    def need(model: ModelConfig) -> int:
        return sum(each(weight) * _held(weight, layout) for weight in weights(model))

    keys = functools.partial(_largest, config.model, need)
    return Part("weights, gradients and moments", need(config.model), keys)


def _average(config: Config, layout: Layout) -> Part:
    """Moving average of the weights, which is in host memory."""

    def need(model: ModelConfig) -> int:
        return sum(FLOAT32 * _held(weight, layout) for weight in weights(model) if weight.trained)

    on = config.optimizer.ema_decay > 0
    keys = functools.partial(_largest, config.model, need)
    return Part("the average of the weights", on * need(config.model), keys)


def _batch(config: Config) -> Part:
    """Tokens of a step's sequences on this process, which are stacked before the step."""
    batch = config.batch
    rows = batch.sequences // jax.process_count()
    keys = {"batch.sequences": batch.sequences, "batch.length": batch.length}
    need = INT32 * rows * (batch.length + 1)
    return Part("the tokens of a step", need, lambda: _by_size(keys))


def _activations(config: Config, layout: Layout) -> Part:
    """Activations of a micro-batch on one device in the backward pass of its last layer.

    Queries, keys, values and one block of scores are there at the same time, and so is the input
    of every layer; with a pipeline, of a layer.
    """
    model, batch = config.model, config.batch
    size = recipe(config.precision.recipe).activation_dtype.itemsize
    rows = batch.micro_sequences // _parts(layout, "batch")
    heads, tokens = model.heads // _parts(layout, "heads"), rows * batch.length
    inputs = 1 if layout.sizes["pipe"] > 1 else model.layers + model.mtp_depth
    widths = 2 * (model.d_nope + model.d_rope) + model.d_value
    block = min(config.layout.attention_block, batch.length)
    scores = FLOAT32 * rows * heads * block * (batch.length // block * block)
    need = size * tokens * (inputs * model.d_model + heads * widths) + scores
    keys = {
        "batch.micro_sequences": batch.micro_sequences,
        "batch.length": batch.length,
        **{f"model.{name}": getattr(model, name) for name in ("heads", "d_model", *_WIDTHS)},
    }
    return Part("activations of a micro-batch", need, lambda: _by_size(keys))


def _parts(layout: Layout, axis: str) -> int:
    """Devices that a logical axis is split over."""
    return math.prod(layout.sizes[name] for name in layout.mesh_axes(axis))


def _by_size(keys: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(keys.items(), key=lambda item: -item[1]))


def _largest(model: ModelConfig, need: Callable[[ModelConfig], int]) -> dict[str, int]:
    """Sizes of a model, by how much less is needed with 1 in place of each."""

    def without(name: str) -> int:
        changes: dict[str, Any] = {name: 1}
        if name == "layers":
            changes["dense_layers"] = min(model.dense_layers, 1)
        return need(dataclasses.replace(model, **changes))

    sizes = {name: getattr(model, name) for name in _SIZES}
    ordered = sorted((name for name, size in sizes.items() if size > 1), key=without)
    return {f"model.{name}": sizes[name] for name in ordered}
