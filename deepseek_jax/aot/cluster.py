"""Virtual cluster of H100s or H800s: programs are compiled for it, and never run.

XLA's CUDA plugin compiles on any machine for devices that it gets a description of. The compiled
program holds schedule, traffic and memory of each device, which `compiled.py` reads, but no times.

The H800 is compiled as an H100: compute and memory are the same (`hardware/chips.py`), and the
compiler learns link speeds from a cost profile only (`cost_model.py`).
"""

import importlib.metadata
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from deepseek_jax.config import MESH_AXES, ConfigError, MeshConfig
from deepseek_jax.hardware import network, xla_options, xla_target

PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
INSTALL = 'pip install -e ".[cluster]"'
_PTXAS = Path("/usr/local/cuda/bin/ptxas")  # default path of the toolkit, which XLA searches too

# XLA selects Triton GEMMs by timing them on the device. Without one, GEMMs stay cuBLAS calls.
OPTIONS: Mapping[str, Any] = {**xla_options.OPTIONS, "xla_gpu_enable_triton_gemm": False}


def installed() -> dict[str, str]:
    """Installed CUDA plugins of JAX -> versions."""
    return {name: version for name in PLUGINS if (version := _version(name))}


def missing() -> str | None:
    """Reason why this process cannot compile for a cluster, with the remedy; None if it can."""
    versions = installed()
    if not versions:
        return f"compiling for a GPU cluster needs the CUDA plugin of JAX: {INSTALL}"
    if jax.__version__ not in versions.values():
        found = " and ".join(f"{name} {version}" for name, version in versions.items())
        name = next(iter(versions))
        return (
            f"jax {jax.__version__} and {found} differ, and must be the same version: "
            f"pip install {name}=={jax.__version__}"
        )
    if (platforms := _platforms()) != "cpu":
        return (
            f"JAX_PLATFORMS is {platforms or 'not set'}; compiling for a cluster "
            "needs JAX_PLATFORMS=cpu, set before JAX starts"
        )
    if not (_version("nvidia-cuda-nvcc") or shutil.which("ptxas") or _PTXAS.exists()):
        return f"compiling for a GPU cluster needs NVIDIA's ptxas: {INSTALL}, or the CUDA toolkit"
    return None


def mesh(sizes: MeshConfig) -> Mesh:
    """Mesh of virtual H100s.

    Only trace and lower under `jax.set_mesh` of this mesh: eager operations, such as
    `jax.random.key(0)`, fail for lack of devices.

    Args:
      sizes: Devices along each axis, none of them -1. `gpu` x `tensor` are the GPUs of one host.

    Raises:
      ConfigError: The plugin is missing or does not fit, or a node has more GPUs than a real one.
    """
    shape = tuple(getattr(sizes, axis) for axis in MESH_AXES)
    host, most = sizes.gpu * sizes.tensor, network.H100.gpus_per_node
    if min(shape) < 1:
        raise ConfigError(f"a virtual cluster needs the size of every axis; found mesh.*={shape}")
    if host > most:
        raise ConfigError(
            f"mesh.gpu={sizes.gpu} x mesh.tensor={sizes.tensor} is {host} GPUs in one node, and "
            f"NVLink joins {most}; use mesh.node for the rest"
        )
    if problem := missing():
        raise ConfigError(problem)
    devices = topologies.get_topology_desc(
        "h100",
        "cuda",
        target_config=xla_target.text(),
        topology=f"1x{math.prod(shape) // host}x{host}",  # partitions x hosts x devices of each
    ).devices
    axis_types = (AxisType.Explicit,) * len(MESH_AXES)
    return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=axis_types)


def compile_for(
    lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None, profile: str = ""
) -> jax.stages.Compiled:
    """Compiles a program that was lowered for `mesh(...)`.

    Args:
      lowered: `jax.jit(f).lower(*arguments)`, each a `jax.ShapeDtypeStruct` with a `NamedSharding`.
      options: Compiler options that extend or replace `OPTIONS`; XLA refuses unknown names.
      profile: Instruction costs for XLA's scheduler, as `cost_model.text` writes them.
    """
    chosen = {**OPTIONS, **(options or {})}
    if not profile:
        return lowered.compile(compiler_options=chosen)
    # A new path each time: JAX caches by options and does not see that a file has changed.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"costs{xla_options.SUFFIX}"
        file.write_text(profile)
        chosen[xla_options.PROFILE] = str(file)
        return lowered.compile(compiler_options=chosen)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _platforms() -> str | None:
    return jax.config.values["jax_platforms"]
