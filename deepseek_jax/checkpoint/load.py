"""A checkpoint directory, opened once: settings, tokenizer and weights of its model.

The directory is a published one (Hugging Face layout) or the workdir of a training run.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax import config as configs
from deepseek_jax.checkpoint.hf import inference, language_part, reader
from deepseek_jax.checkpoint.hf.safetensors import json_object, read_bytes, read_json
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import Config, ConfigError, ModelConfig
from deepseek_jax.config.hints import shown
from deepseek_jax.data import marks
from deepseek_jax.data import tokenizer as tokenizers
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model import least_memory, params
from deepseek_jax.model.params import Weight
from deepseek_jax.model.transformer import Transformer, abstract_model
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.precision.recipes import FLOAT32, Recipe
from deepseek_jax.runtime.agreement import raise_together

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened directory: its config.json and the headers of its tensors are read and checked.

    Values are read by `load`, `conversion` and `open_run`, from the files that are open already.

    Attributes:
      directory: path of the opened directory.
      settings: content of config.json.
      run: config of the training run; None for a published checkpoint.
      published: tensors of a published checkpoint by name; None for a workdir.
    """

    directory: Path
    settings: Mapping[str, Any]
    run: Config | None
    published: reader.Published | None
    _read: dict[str, bytes | None] = dataclasses.field(default_factory=dict, repr=False)

    def text_of(self, name: str) -> bytes | None:
        """Content of a small file of the directory, read once; None where there is none."""
        if name not in self._read:
            file = self.directory / name
            self._read[name] = read_bytes(file) if file.is_file() else None
        return self._read[name]

    def _object_of(self, name: str) -> Mapping[str, Any]:
        text = self.text_of(name)
        return {} if text is None else json_object(text, str(self.directory / name))

    @property
    def model(self) -> ModelConfig:
        """Sizes and rules of the model."""
        if self.run is not None:
            return self.run.model
        assert self.published is not None
        return self.published.config

    @functools.cached_property
    def text_settings(self) -> Mapping[str, Any]:
        """Settings of the text model: `settings`, or the part of them that is about it."""
        return language_part.of(self.settings)

    def config(self, recipe: str | None = None) -> Config:
        """Config of a forward pass: the run's own, or what a published config.json states.

        Args:
          recipe: `precision.recipe` in place of the stated one.
        """
        if self.run is None:
            stated = self.directory / "config.json"
            chosen = recipe or inference.stated_recipe(self.text_settings, stated)
            scales = inference.stated_scales(self.text_settings)
            return inference.inference_config(self.model, chosen, scales)
        return self.run if recipe is None else with_recipe(self.run, recipe)

    @functools.cached_property
    def generation(self) -> Mapping[str, Any]:
        """Content of generation_config.json; empty where there is none."""
        found = self._object_of("generation_config.json")
        self._check_ids(found, "generation_config.json")
        return found

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of tokenizer.json; None where there is none."""
        text = self.text_of("tokenizer.json")
        if text is None:
            return None
        beside = [self._object_of(marks.FILES[0]), self.generation, self.text_settings]
        return tokenizers.read(self.directory / "tokenizer.json", text, beside)

    def _check_ids(self, settings: Mapping[str, Any], name: str) -> None:
        for key in ("bos_token_id", "eos_token_id"):
            value = settings.get(key)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(one) is int and -1 <= one < 2**31 for one in ids):
                raise ConfigError(
                    f"{self.directory / name}: {key} is {shown(value)}; expected ids, or null"
                )

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end a text, from the generation settings, config.json or the tokenizer."""
        for settings in (self.generation, self.text_settings):
            stop = settings.get("eos_token_id")
            if stop is not None:
                return tuple(stop) if isinstance(stop, list) else (stop,)
        return () if self.tokenizer is None else (self.tokenizer.marks.eos,)

    def load(
        self, recipe: Recipe = FLOAT32, layout: Layout | None = None, mesh: Mesh | None = None
    ) -> Transformer:
        """The model with its weights; every process of the mesh has to call this.

        Args:
          recipe: its `stored_dtype` is that of the weights, for `params.prepare`; norms, router
            and biases stay float32. Where it `keeps_blocks`, weights that a published checkpoint
            holds in FP8 keep their values and scales.
          layout, mesh: placement of each parameter, `layout.storage`: the places that compute
            wants, and under ZeRO the parts that it gathers. Without them, the default device.

        Raises:
          ConfigError: values that are damaged or not finite; in all processes if in one.
        """

        def loaded() -> Transformer:
            source = self.published
            kept = frozenset() if source is None else reader.blocks(source, recipe)
            least_memory.check_weights(self.model, recipe, layout, kept)

            def where(weight: Weight) -> Sharding:
                return place(weight, layout, mesh)

            if source is not None:
                return reader.load(source, recipe, where, kept)
            return _restored(self.directory, self.model, recipe, where)

        return raise_together(loaded)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Opens a Hugging Face directory or a run's workdir; every process has to call this.

    Raises:
      ConfigError: no checkpoint, or one that cannot be loaded as far as this shows without reading
        a value; the message says what was found and expected. It is raised in all processes if it
        is in one.
    """

    def opened() -> Checkpoint:
        settings = read_json(directory / "config.json")
        if isinstance(settings.get("model"), dict):
            return Checkpoint(directory, settings, configs.parse_saved(settings), None)
        found = Checkpoint(directory, settings, None, reader.open_folder(directory, settings))
        found._check_ids(found.text_settings, "config.json")
        return found

    return raise_together(opened)


def load(
    directory: Path,
    recipe: Recipe = FLOAT32,
    layout: Layout | None = None,
    mesh: Mesh | None = None,
) -> Transformer:
    """`Checkpoint.load` for a directory of which nothing but the model is wanted."""
    return open_checkpoint(directory).load(recipe, layout, mesh)


def with_recipe(config: Config, recipe: str) -> Config:
    """The same config with another `precision.recipe`."""
    precision = dataclasses.replace(config.precision, recipe=recipe)
    return dataclasses.replace(config, precision=precision)


def place(weight: Weight, layout: Layout | None, mesh: Mesh | None) -> Sharding:
    """Sharding of a parameter's master in training; ZeRO shards what gradients update, alone."""
    if layout is None or mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    if weight.trained:
        return NamedSharding(mesh, layout.storage(weight.axes, weight.shape))
    spec = layout.spec(weight.axes)
    return NamedSharding(mesh, spec if any(spec) else P())


def open_run(workdir: Path, config: ModelConfig) -> Callable[[str, tuple[Any, ...]], np.ndarray]:
    """Opens the newest saved step of a run, to read float32 masters and router biases in parts.

    Returns:
      read(path, index): the part `index` of a parameter; `path` is its name in `params.describe`.

    Raises:
      ConfigError: no saved step can be read. To find out, each is read once, a part at a time.
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
    """Parameters by their names in a run's saved steps."""
    weights = params.describe(abstract_model(config))
    return {f"{_part(weight)}.{weight.path}": weight for weight in weights}


def _restored(
    workdir: Path, config: ModelConfig, recipe: Recipe, where: reader.Place
) -> Transformer:
    """The model of a run's newest saved step; each process reads the parts of its own devices."""
    abstract = abstract_model(config)
    wanted = _wanted(abstract, where)
    store = Store(workdir / "checkpoints", keep=1)
    try:
        _, values, _ = _found(store.restore(wanted, partial=True), workdir)
    finally:
        store.close()
    leaves = [values[_part(weight)][weight.path] for weight in params.describe(abstract)]
    return params.stored(jax.tree.unflatten(jax.tree.structure(abstract), leaves), recipe)


def _wanted(abstract: Transformer, where: reader.Place | None) -> dict[str, dict[str, Any]]:
    """Shapes and shardings of the leaves of a saved step that are the model's parameters."""
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
