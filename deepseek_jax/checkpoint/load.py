"""A model's weights from either kind of folder: published ones, or a run's newest checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax import config as configs
from deepseek_jax.checkpoint.hf import reader
from deepseek_jax.checkpoint.hf.safetensors import read_json
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import Config, ConfigError, ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.params import Weight
from deepseek_jax.model.transformer import Transformer, abstract_model
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.precision.recipes import FLOAT32, Recipe
from deepseek_jax.runtime.agreement import raise_together

T = TypeVar("T")


def load(
    directory: Path,
    recipe: Recipe = FLOAT32,
    layout: Layout | None = None,
    mesh: Mesh | None = None,
) -> Transformer:
    """The model in a Hugging Face directory or a run's workdir; its sizes are `.config`.

    Args:
      recipe: its `stored_dtype` is that of the weights, for `params.prepare`; norms, router and
        biases stay float32.
      layout, mesh: where each parameter goes, `layout.storage`: the places that compute wants, and
        under ZeRO the parts that it gathers. Without them, the default device.

    Raises:
      ConfigError: what is there cannot be loaded; the message says what was found and expected.
        It is raised in all processes if it is in one.
    """
    return raise_together(
        lambda: _loaded(directory, recipe, lambda weight: place(weight, layout, mesh))
    )


def model_of(directory: Path) -> ModelConfig:
    """The sizes of the model that `load` would return, from files that hold no values.

    Raises:
      ConfigError: as `load`, for what can be wrong without reading a value.
    """

    def found() -> ModelConfig:
        run = trained(directory)
        return run.model if run else reader.open_folder(directory).config

    return raise_together(found)


def _loaded(directory: Path, recipe: Recipe, where: reader.Place) -> Transformer:
    run = trained(directory)
    if run is None:
        return reader.load(directory, recipe, where)
    return _restored(directory, run.model, recipe, where)


def trained(directory: Path) -> Config | None:
    """The config of a run, if the folder is a run's; None where its config.json is another's."""
    settings = read_json(directory / "config.json")
    return configs.parse_saved(settings) if isinstance(settings.get("model"), dict) else None


def place(weight: Weight, layout: Layout | None, mesh: Mesh | None) -> Sharding:
    """Where training keeps this parameter as a master; a router bias is whole everywhere."""
    if layout is None or mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, layout.storage(weight.axes, weight.shape) if weight.trained else P())


def open_run(workdir: Path, config: ModelConfig) -> Callable[[str, tuple[Any, ...]], np.ndarray]:
    """Reads parts of the float32 masters and router biases of a run's newest checkpoint.

    Returns:
      read(path, index): of a parameter, as `params.describe` names it, the part that `index` is.

    Raises:
      ConfigError: no checkpoint that can be read; each is read once, a part at a time, to see.
    """
    wanted = _wanted(abstract_model(config), None)
    store = Store(workdir / "checkpoints", keep=1)
    try:
        leaves = _found(store.open(wanted), workdir)
    finally:
        store.close()
    part_of = {path: part for part, paths in wanted.items() for path in paths}
    return lambda path, index: leaves.read(f"{part_of[path]}.{path}", index)


def leaves_of(config: ModelConfig) -> dict[str, Weight]:
    """The parameters by the names that a run's checkpoint has for them."""
    weights = params.describe(abstract_model(config))
    return {f"{_part(weight)}.{weight.path}": weight for weight in weights}


def _restored(
    workdir: Path, config: ModelConfig, recipe: Recipe, where: reader.Place
) -> Transformer:
    """Masters and router biases of a run's newest checkpoint; each process reads its own parts."""
    abstract = abstract_model(config)
    wanted = _wanted(abstract, where)
    store = Store(workdir / "checkpoints", keep=1)
    try:
        _, values, _ = _found(store.restore(wanted, partial=True), workdir)
    finally:
        store.close()
    leaves = []
    for weight in params.describe(abstract):
        leaf = values[_part(weight)][weight.path]
        bad = sum(reader.not_finite(np.asarray(shard.data)) for shard in leaf.addressable_shards)
        if bad:
            raise ConfigError(
                f"{workdir}: {weight.path} holds {bad} values that are not finite, expected none"
            )
        leaves.append(leaf)
    return params.stored(jax.tree.unflatten(jax.tree.structure(abstract), leaves), recipe)


def _wanted(abstract: Transformer, where: reader.Place | None) -> dict[str, dict[str, Any]]:
    """The leaves of a run's checkpoint that are the model's parameters."""
    wanted: dict[str, dict[str, Any]] = {"params": {}, "bias": {}}
    for weight in params.describe(abstract):
        place = where(weight) if where else None
        leaf = jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=place)
        wanted[_part(weight)][weight.path] = leaf
    return wanted


def _part(weight: Weight) -> str:
    return "params" if weight.trained else "bias"


def _found(saved: T | None, workdir: Path) -> T:
    if saved is None:
        raise ConfigError(f"{workdir}/checkpoints holds no checkpoint; expected a saved step")
    return saved
