"""Candidates of a search: layouts of a config on a number of devices that its own checks accept."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from deepseek_jax.config import Config, stage_count
from deepseek_jax.config.schema import MeshConfig
from deepseek_jax.hardware.chips import Chip
from deepseek_jax.plan.changed_config import is_accepted
from deepseek_jax.plan.machine import Machine

POLICIES = ("none", "report", "attention", "full")
ROWS = (1, 2, 4, 8, 16)  # sequences of a micro-batch on one device
_PEAKS = {"fp8": "float8", "bfloat16": "bfloat16", "float32": "tf32"}


def recipes(config: Config, chip: Chip) -> tuple[str, ...]:
    """Recipes that the chip multiplies; float32 only where the config has it."""
    known = [name for name in ("fp8", "bfloat16") if _PEAKS[name] in chip.peak_flops_per_s]
    return (*known, "float32") if config.precision.recipe == "float32" else tuple(known)


def meshes(config: Config, devices: int, node: int) -> Iterator[MeshConfig]:
    """Meshes of `devices` devices in nodes of `node` GPUs.

    `gpu` x `tensor` is a whole node where there are several, and may be a part of a single one.
    """
    model = config.model
    single = devices <= node
    for tensor in divisors(min(devices, node)):
        if model.heads % tensor:
            continue
        inside = divisors(devices // tensor) if single else [node // tensor]
        for gpu in inside:
            for pipe in (
                divisors(devices // (gpu * tensor)) if devices % (gpu * tensor) == 0 else ()
            ):
                rest = devices // (gpu * tensor * pipe)
                for nodes in [1] if single else divisors(rest):
                    if pipe <= model.layers and model.experts % (nodes * gpu) == 0:
                        yield MeshConfig(
                            pipe=pipe, replica=rest // nodes, node=nodes, gpu=gpu, tensor=tensor
                        )


def candidates(config: Config, devices: int, machine: Machine) -> Iterator[Config]:
    """Configs of all layouts, recomputations and recipes that the checks accept.

    The model, the batch of a step and the rules of the layout stay those of the config.
    """
    for mesh in meshes(config, devices, machine.network.gpus_per_node):
        for micro_sequences in _micro_batches(config, mesh):
            for layout in _layouts(config, mesh):
                batch = dataclasses.replace(config.batch, micro_sequences=micro_sequences)
                found = dataclasses.replace(config, mesh=mesh, batch=batch, layout=layout)
                if not is_accepted(found):
                    continue
                for recipe in recipes(config, machine.chip):
                    precision = dataclasses.replace(config.precision, recipe=recipe)
                    for policy in _policies(config, mesh):
                        yield dataclasses.replace(
                            found,
                            precision=precision,
                            layout=dataclasses.replace(layout, recompute=policy),
                        )


def _policies(config: Config, mesh: MeshConfig) -> tuple[str, ...]:
    """Recompute policies; "none" without a pipeline, which keeps scores, only if the config's."""
    own = config.layout.recompute == "none"
    return POLICIES if own or mesh.pipe > 1 else POLICIES[1:]


def _micro_batches(config: Config, mesh: MeshConfig) -> Iterator[int]:
    """Sequences of a micro-batch that divide the steps, a whole number on each device."""
    parts, batch = mesh.replica * mesh.node * mesh.gpu, config.batch
    for rows in ROWS:
        if batch.sequences % (rows * parts) == 0 and batch.ramp_sequences % (rows * parts) == 0:
            yield rows * parts


def _layouts(config: Config, mesh: MeshConfig) -> Iterator[Any]:
    """Layouts of a mesh: schedule, micro-batches in flight, ZeRO and dispatch."""
    layout, model = config.layout, config.model
    if mesh.node > 1 and model.groups % mesh.node and layout.dispatch == "two_hop":
        layout = dataclasses.replace(layout, dispatch="flat")
    staged = mesh.pipe > 1
    kinds = ("dualpipe", "dualpipev", "1f1b") if staged else (layout.pipeline,)
    for kind in kinds:
        stages = stage_count(kind, mesh.pipe)
        if stages > model.layers:
            continue
        for in_flight in (1,) if staged else (1, 2):
            for zero in (0, 1) if staged else (0, 1, 3):
                beside = in_flight == 2 or (staged and kind != "1f1b")
                yield dataclasses.replace(
                    layout,
                    pipeline=kind,
                    micro_batches_in_flight=in_flight,
                    zero=zero,
                    stage_layers=layout.stage_layers if stages == len(layout.stage_layers) else (),
                    defer_weight_gradients=layout.defer_weight_gradients and kind != "1f1b",
                    communication_sms=layout.communication_sms if beside else 0,
                )


def divisors(number: int) -> list[int]:
    """Divisors of a number, in order."""
    return [each for each in range(1, number + 1) if number % each == 0]


def overrides(config: Config, base: Config) -> list[str]:
    """Flags that make a candidate of the base's file: `--config.mesh.pipe=16` and others."""
    found = []
    for section in ("mesh", "layout", "precision", "batch"):
        for key, value in _changed(getattr(config, section), getattr(base, section)):
            found.append(f"--config.{section}.{key}={value}")
    return found


def _changed(section: Any, base: Any) -> Iterable[tuple[str, Any]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if value != getattr(base, field.name):
            yield field.name, value
