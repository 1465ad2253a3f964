"""Device mesh, shaped like the cluster: pipe, replica, node, gpu, tensor, outermost first."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from deepseek_jax.config import DATA_AXES, MESH_AXES, Config, ConfigError, MeshConfig, check
from deepseek_jax.parallel.axes import Layout


def resolve(config: MeshConfig, devices: int) -> MeshConfig:
    """Replaces the -1 of `config.mesh` by its size; checks that the mesh has `devices` devices."""
    sizes = dataclasses.asdict(config)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if free and devices % fixed:
        raise ConfigError(
            f"mesh.{free[0]}=-1 takes the remaining devices, but the other axes ({shape}) need a "
            f"multiple of {fixed} devices and there are {devices}"
        )
    if free:
        sizes[free[0]] = devices // fixed
    elif fixed != devices:
        raise ConfigError(
            f"the mesh ({shape}) needs {fixed} devices and there are {devices}; change mesh.*, set "
            f"one axis to -1, or use --devices={fixed} to plan, --emulate_devices={fixed} on a CPU"
        )
    return MeshConfig(**sizes)


def build(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with explicit axes over `devices`; by default over all devices of all processes."""
    shape = tuple(getattr(config, name) for name in MESH_AXES)
    return jax.make_mesh(
        shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES), devices=devices
    )


def layout(config: Config) -> Layout:
    """The `Layout` of this config, whose `mesh` must be resolved."""
    sizes = {name: getattr(config.mesh, name) for name in MESH_AXES}
    return Layout(rules=dict(config.layout.rules), sizes=sizes, zero=config.layout.zero)


def forward_config(config: Config, mesh: Mapping[str, int], length: int) -> Config:
    """Checked config of a forward pass alone, on this mesh and with sequences of this length.

    Args:
      mesh: mesh axis -> devices along it; 1 along the others. Empty: a single device, however many
        there are.

    Raises:
      ConfigError: settings do not fit together, or one device is to serve several processes.
    """
    if not mesh and jax.process_count() > 1:
        raise ConfigError(
            f"one device cannot serve {jax.process_count()} processes; set --mesh to all "
            f"{jax.device_count()} devices, for example --mesh=gpu:{jax.device_count()}"
        )
    sizes = MeshConfig(**{name: mesh.get(name, 1) for name in MESH_AXES})
    resolved = resolve(sizes, jax.device_count() if mesh else 1)
    kept = dataclasses.replace(
        config.layout,
        zero=3 if config.layout.zero == 3 else 0,  # there are weights, but no masters or moments
        stage_layers=(),
        micro_batches_in_flight=1,
    )
    config = dataclasses.replace(config, mesh=resolved, layout=kept)
    parts = math.prod(layout(config).sizes[name] for name in DATA_AXES)
    rows = -(-config.batch.micro_sequences // parts) * parts
    length = max(length, config.model.mtp_depth + 1)  # the least that the checks accept
    batch = dataclasses.replace(
        config.batch, length=length, sequences=rows, ramp_sequences=rows, micro_sequences=rows
    )
    schedule = dataclasses.replace(config.schedule, warmup_steps=0)
    config = dataclasses.replace(config, batch=batch, schedule=schedule)
    check(config)
    return config


def spread(value: np.ndarray, place: NamedSharding) -> jax.Array:
    """Global array with sharding `place`, from a value that every process holds whole."""
    return jax.make_array_from_callback(value.shape, place, lambda index: value[index])
