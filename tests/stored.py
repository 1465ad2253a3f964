"""Small training states, and stores with steps of them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.checkpoint.store import Store

META = {"tokens": 10**13, "data": {"epoch": 0, "position": [1, 2]}, "loss": 0.1}


def shardings(devices: int, spec: P, memory: str | None = None):
    mesh = jax.make_mesh(
        (devices,), ("gpu",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    return NamedSharding(mesh, spec, memory_kind=memory)


def example(seed: int = 0, devices: int = 8, dim: int = 0):
    """A state like a train state: masters, bfloat16 moments, an average in host memory."""
    rng = np.random.default_rng(seed)
    spec = P(*[None] * dim, "gpu")
    split, whole = shardings(devices, spec), shardings(devices, P())
    pinned = shardings(devices, spec, "pinned_host")
    weight = rng.normal(size=(64, 128)).astype(np.float32)
    return {
        "params": {"w": jax.device_put(weight, split), "b": jax.device_put(weight[0], whole)},
        "moments": [jax.device_put(jnp.asarray(weight * k, jnp.bfloat16), split) for k in (1, 2)],
        "average": jax.device_put(weight + 1, pinned),
        "step": jax.device_put(np.int32(seed), whole),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def written(store: Store, *steps: int) -> Path:
    """The store's directory, with these steps in it."""
    for step in steps:
        store.save(step, example(step), {**META, "step": step})
    store.wait()
    return store._directory


def reopened(store: Store) -> Store:
    return Store(store._directory, keep=3)


def data_file(step: Path) -> Path:
    """The largest file of array data; small leaves are kept inside the index."""
    return max(step.glob("state/*/d/*"), key=lambda file: file.stat().st_size)


def named(state):
    flat = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def value_of(state):
    return np.asarray(state["params"]["w"])
