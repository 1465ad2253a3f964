"""A model's weights from either kind of folder: published ones, or a run's newest checkpoint."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax import config as configs
from deepseek_jax.checkpoint import hf
from deepseek_jax.checkpoint.safetensors import read_json
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import Config, ConfigError, ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.params import Weight
from deepseek_jax.model.transformer import Transformer, abstract_model
from deepseek_jax.parallel.axes import Layout


def load(
    directory: Path,
    dtype: Any = jnp.float32,
    layout: Layout | None = None,
    mesh: Mesh | None = None,
) -> Transformer:
    """The model in a Hugging Face directory or a run's workdir; its sizes are `.config`.

    Args:
      dtype: of the weights; norms, router and biases stay float32 (`params.cast`).
      layout, mesh: where each parameter goes, `layout.storage`: the places that compute wants, and
        under ZeRO the parts that it gathers. Without them, the default device.

    Raises:
      ConfigError: what is there cannot be loaded; the message says what was found and expected.
    """
    run = trained(directory)
    if run is None:
        return hf.load(directory, dtype, lambda weight: place(weight, layout, mesh))
    return _restored(directory, run.model, dtype, lambda weight: place(weight, layout, mesh))


def trained(directory: Path) -> Config | None:
    """The config of a run, if the folder is a run's; None where its config.json is another's."""
    settings = read_json(directory / "config.json")
    return configs.parse(settings) if isinstance(settings.get("model"), dict) else None


def place(weight: Weight, layout: Layout | None, mesh: Mesh | None) -> Sharding:
    """Where training keeps this parameter as a master; a router bias is whole everywhere."""
    if layout is None or mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, layout.storage(weight.axes, weight.shape) if weight.trained else P())


def _restored(workdir: Path, config: ModelConfig, dtype: Any, where: hf.Place) -> Transformer:
    """Masters and router biases of a run's newest checkpoint; each process reads its own parts."""
    abstract = abstract_model(config)
    wanted: dict[str, dict[str, Any]] = {"params": {}, "bias": {}}
    names = [("params" if w.trained else "bias", w) for w in params.describe(abstract)]
    for part, weight in names:
        leaf = jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=where(weight))
        wanted[part][weight.path] = leaf
    store = Store(workdir / "checkpoints", keep=1)
    try:
        restored = store.restore(wanted, partial=True)
    finally:
        store.close()
    if restored is None:
        raise ConfigError(f"{workdir}/checkpoints holds no checkpoint; expected a saved step")
    values = restored[1]
    leaves = [values[part][weight.path] for part, weight in names]
    return params.cast(jax.tree.unflatten(jax.tree.structure(abstract), leaves), dtype)
