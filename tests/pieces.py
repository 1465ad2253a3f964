"""Helpers: a function mapped over a layout, and numbers whose sums are exact."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import small
from jax.sharding import NamedSharding

from deepseek_jax.parallel import axes
from deepseek_jax.parallel.axes import Layout


def integers(*shape: int, seed: int) -> np.ndarray:
    """Small enough that float32 sums are exact in any order."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def mapped(fn: Callable[..., Any], layout: Layout, in_specs: tuple, out_specs: Any):
    """Compiled once; takes whole arrays, one for each of `in_specs`, and returns whole arrays."""
    mesh = small.mesh_of(layout.sizes)

    def local(*arguments):
        with axes.active(layout):
            return fn(*arguments)

    compiled = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )
    places = tuple(NamedSharding(mesh, spec) for spec in in_specs)

    def run(*arguments):
        with jax.set_mesh(mesh):
            return jax.device_get(compiled(*jax.device_put(arguments, places)))

    return run
