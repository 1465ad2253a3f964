"""The device mesh, shaped like the cluster: pipe, replica, node, gpu, tensor, outermost first."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from deepseek_jax.config import Config, ConfigError, MeshConfig
from deepseek_jax.parallel.axes import MESH_AXES, Layout


def resolve(config: MeshConfig, devices: int) -> MeshConfig:
    """Fills in the one -1 of `config.mesh` and checks the product against the devices there are."""
    sizes = dataclasses.asdict(config)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if free and devices % fixed:
        raise ConfigError(
            f"mesh.{free[0]}=-1 asks for what is left, but the other axes ({shape}) need a "
            f"multiple of {fixed} devices and there are {devices}"
        )
    if free:
        sizes[free[0]] = devices // fixed
    elif fixed != devices:
        raise ConfigError(
            f"the mesh ({shape}) needs {fixed} devices and there are {devices}; change mesh.*, set "
            f"one axis to -1, or use --emulate_devices={fixed} to try this layout on a CPU"
        )
    return MeshConfig(**sizes)


def build(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over these devices, or all devices of all processes, with explicit axes."""
    shape = tuple(getattr(config, name) for name in MESH_AXES)
    return jax.make_mesh(
        shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES), devices=devices
    )


def layout(config: Config) -> Layout:
    """The logical -> mesh table of this config; `config.mesh` must be resolved."""
    sizes = {name: getattr(config.mesh, name) for name in MESH_AXES}
    return Layout(rules=dict(config.layout.rules), sizes=sizes, zero=config.layout.zero)
