"""Conversion of a Hugging Face directory to a workdir, back, or to another published format.

A converted workdir holds weights and router biases alone, as step 0; training starts with fresh
moments and averages. Files beside the weights go with them (`checkpoint/carried.py`). All that can
be refused without reading a value is refused before one is read.
"""

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax import config as configs
from deepseek_jax.checkpoint import carried, fresh_indexers, load, new_folder
from deepseek_jax.checkpoint.hf import (
    chat_template,
    config_json,
    export,
    language_part,
    names,
    reader,
    safetensors,
)
from deepseek_jax.checkpoint.load import Checkpoint
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import Config, ConfigError, ModelConfig, PrecisionConfig
from deepseek_jax.data import tokenizer as tokenizers
from deepseek_jax.errors import reason
from deepseek_jax.model import params
from deepseek_jax.model.transformer import Transformer, abstract_model
from deepseek_jax.precision.fp8_tiles import E4M3

_MARKS = ("bos_token_id", "eos_token_id")
WEIGHTS_ONLY = {"weights_only": True, "tokens": 0}  # `meta` of the step that training starts at
_LAUNCHER = '''"""The config of this folder: edit it, or set any of its keys on the command line."""

import json
from pathlib import Path

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(json.loads(Path(__file__).with_name("config.json").read_text()))
'''


def to_run(source: Checkpoint, target: Path, base: Config) -> Config:
    """Makes a workdir with the weights of a Hugging Face directory, on which `main` trains on.

    Args:
      source: a published checkpoint.
      target: a folder that does not exist, or is empty.
      base: the training recipe; its model is replaced by the checkpoint's, and its tokenizer too
        if the checkpoint has one. Where it has indexers and the checkpoint none, new ones are made.

    Raises:
      ConfigError: values that loading refuses, or a target that cannot be written.
    """
    found = source.published
    if found is None:
        raise ConfigError(
            f"{source.directory} is a workdir already; expected a Hugging Face directory"
        )
    _check_place(source.directory, target)
    if language_part.is_tied(source.settings):
        warnings.warn(
            f"{source.directory / 'config.json'}: tie_word_embeddings is true; embedding and head "
            "are two matrices here, which training moves apart",
            stacklevel=2,
        )
    beside = carried.files(source.directory, is_run=False)
    own_tokenizer, layout = "tokenizer.json" in beside, config_json.tensor_layout(source.settings)
    config = _run_config(found, target, base, own_tokenizer, layout.biased)
    configs.check(config)
    like = load.leaves_of(config.model)
    scales = {name: each for name, each in found.tensors.items() if name.endswith(names.SCALE)}
    raw = {carried.SCALES: scales, carried.OTHERS: found.others}
    masters = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in like.values())
    masters += sum(each.nbytes for tensors in raw.values() for each in tensors.values())
    with new_folder.appearing(target) as folder:
        new_folder.check_space(folder, target, masters + 2 * carried.size(beside))
        _fill_beside(folder, source, config, beside)
        found.compare_copies()
        for name, tensors in raw.items():
            if tensors:
                safetensors.write_raw(folder / carried.KEPT / name, tensors)
        read, store = reader.parts_of(found), Store(folder / "checkpoints", keep=1)
        if config.model != found.config:
            read = fresh_indexers.reading(read, config.model.init_std)
        try:
            store.save_parts(0, like, lambda name, part: read(like[name], part), WEIGHTS_ONLY)
        except ConfigError:
            raise
        except ValueError as error:  # tensorstore's, for a disk that is full
            raise ConfigError(f"target={target} cannot be written ({reason(error)})") from error
        finally:
            store.close()
    return config


def _fill_beside(
    folder: Path, source: Checkpoint, config: Config, beside: Mapping[str, Path]
) -> None:
    """Writes all of a workdir but its weights."""
    (folder / "config.json").write_text(config.to_json() + "\n")
    (folder / "config.py").write_text(_LAUNCHER)
    used = {name: path for name, path in beside.items() if name in carried.USED}
    rest = {name: path for name, path in beside.items() if name not in used}
    kept = folder / carried.KEPT
    kept.mkdir()
    carried.copy(used, (folder, kept), _read_before(source, used))
    carried.copy(rest, (kept,), {})
    (kept / "config.json").write_text(json.dumps(dict(source.settings), indent=2) + "\n")
    _write_marks(folder, {key: source.text_settings.get(key) for key in _MARKS})


def _run_config(
    found: reader.Published, target: Path, base: Config, own_tokenizer: bool, biased: bool
) -> Config:
    """The recipe `base` for a checkpoint's model and tokenizer."""
    data, schedule = base.data, base.schedule
    if own_tokenizer:
        data = dataclasses.replace(data, tokenizer=str(target.absolute() / "tokenizer.json"))
    if not biased:  # the way back has no place for biases that are not zero
        schedule = dataclasses.replace(schedule, bias_speed=0.0)
    model = found.config
    if base.model.index_heads and not model.index_heads:
        keys = ("index_heads", "index_width", "index_top_k")
        model = dataclasses.replace(model, **{key: getattr(base.model, key) for key in keys})
    return dataclasses.replace(base, model=model, data=data, schedule=schedule)


def to_published(
    source: Checkpoint,
    target: Path,
    form: str,
    shard_bytes: int,
    weights: Transformer | None = None,
    scales: str = "kept",
) -> None:
    """Makes a Hugging Face directory with the weights of a workdir, or of another such directory.

    Args:
      target: a folder that does not exist, or is empty.
      form: one of `export.FORMATS`.
      shard_bytes: the largest size of a file.
      weights: the model on one device, whose weights are written instead of those of `source`.
      scales: one of `export.SCALES`; "kept" for other forms than FP8.

    Raises:
      ConfigError: values that loading refuses, a model without a published form, or a target that
        cannot be written.
    """
    _check_place(source.directory, target)
    is_run = source.run is not None
    described = (
        described_run(source.directory, source.model)
        if is_run
        else _described(source.settings, source.model)
    )
    beside = carried.files(source.directory, is_run)
    marks = _marks(source, described)
    described = language_part.replaced(described, marks)
    described = carried.without_absent_code(described, beside)
    if form == "fp8" and source.run is not None:
        described = _with_scales_of(source.run.precision, described)
    if odd := config_json.understood_here_alone(described):
        warnings.warn(
            f"the model has {' and '.join(odd)}, which other readers of {described['model_type']} "
            "pass over: they would compute another model",
            stacklevel=2,
        )
    others = _others(source, described)
    described = config_json.in_format(described, form, scales)
    described = language_part.leaving_others(described, others)
    needed = export.most_bytes(source.model, form) + carried.size(beside)
    needed += sum(tensor.nbytes for tensor in others.values())
    with new_folder.appearing(target) as folder:
        new_folder.check_space(folder, target, needed)
        carried.copy(beside, (folder,), _read_before(source, beside))
        for name, text in _for_readers(source, beside).items():
            (folder / name).write_text(text, encoding="utf-8")
        _write_marks(folder, marks)
        if weights is not None:
            values = export.of_model(weights, config_json.tensor_layout(described))
        elif source.published is not None:
            source.published.compare_copies()
            values = _of_folder(source.published)
        else:
            values = _of_run(source.directory, source.model, described)
        values = dataclasses.replace(values, others=others)
        export.write(folder, described, values, form, shard_bytes, scales)


def _with_scales_of(precision: PrecisionConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that state the scales which a run in FP8 computed with.

    Where its weights came in FP8, the format of those scales stays.
    """
    powers = precision.recipe == "fp8" and precision.scales == "power_of_two"
    if not powers or language_part.of(settings).get("quantization_config"):
        return dict(settings)
    return {**settings, "quantization_config": {"scale_fmt": "ue8m0"}}


def _others(source: Checkpoint, described: Mapping[str, Any]) -> Mapping[str, safetensors.Tensor]:
    """Tensors of parts beside the text model, which belong into a directory so described."""
    if source.published is not None:
        return source.published.others
    file = source.directory / carried.KEPT / carried.OTHERS
    if not file.is_file():
        return {}
    others = safetensors.open_file(file)
    if language_part.is_wrapped(described):
        return others
    warnings.warn(
        f"the model of {source.directory} is no longer the one that it was converted from; "
        f"{len(others)} tensors beside it, {min(others)} the first, are left out",
        stacklevel=2,
    )
    return {}


def described_run(workdir: Path, model: ModelConfig) -> dict[str, Any]:
    """Published settings for the model of a run: those that its weights came with, if they fit.

    Raises:
      ConfigError: a model without a published form.
    """
    kept = carried.settings(workdir)
    if kept is not None:
        source = workdir / carried.KEPT / "config.json"
        found = config_json.model_config(kept, source=source)
        if dataclasses.replace(found, mtp_depth=model.mtp_depth) == model:
            return _described(kept, model)
    return config_json.published(model)


def _described(settings: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The same settings, with the number of MTP layers that the model has, and a head apart."""
    settings = language_part.untied(settings)
    found, changes = language_part.of(settings), {}
    if (found.get("num_nextn_predict_layers") or 0) != model.mtp_depth:
        changes["num_nextn_predict_layers"] = model.mtp_depth
    if model.mtp_depth and (found.get("first_k_dense_replace") or 0) > model.layers:
        changes["first_k_dense_replace"] = model.layers  # MTP layers count on, and have experts
    return language_part.replaced(settings, changes)


def obstacle(workdir: Path, config: Config) -> str | None:
    """The reason why `convert` would refuse the run when it is trained; None if it would not."""
    try:
        described = described_run(workdir, config.model)
    except ConfigError as error:
        return f"this run will have no published form: {error}"
    schedule, model = config.schedule, config.model
    moves = schedule.bias_speed and schedule.bias_stop and model.moe_layers + model.mtp_depth
    if moves and not config_json.tensor_layout(described).biased:
        return (
            f"this run will have no published form: {described['model_type']} has no router "
            "biases; schedule.bias_speed=0 keeps them at zero"
        )
    return None


def _check_place(source: Path, target: Path) -> None:
    """Refuses a target among the source's saved steps, where its name could be a step's."""
    steps = os.path.realpath(source / "checkpoints")
    if os.path.commonpath([steps, os.path.realpath(target)]) == steps:
        raise ConfigError(
            f"target={target} lies among the checkpoints of {source}; give another one"
        )


def _read_before(source: Checkpoint, beside: Mapping[str, Path]) -> dict[str, bytes]:
    """Contents of files that the checkpoint has read, so that each is opened once."""
    texts = {
        name: source.text_of(name)
        for name, path in beside.items()
        if name in carried.USED and path.parent == source.directory
    }
    return {name: text for name, text in texts.items() if text is not None}


def _for_readers(source: Checkpoint, beside: Mapping[str, Path]) -> dict[str, str]:
    """Files with which servers read the texts of a checkpoint with a tokenizer, by their names.

    A tokenizer that a run made itself begins texts with BOS for other readers too, and states its
    marks. Where there is no chat template, a minimal one is made.
    """
    name = "tokenizer.json"
    found: dict[str, str] = {}
    if name not in beside:
        return found

    def is_own(name: str) -> bool:
        return beside[name] == source.directory / name

    def read(name: str) -> Mapping[str, Any]:
        text = source.text_of(name) if is_own(name) else safetensors.read_bytes(beside[name])
        return safetensors.json_object(text or b"{}", str(beside[name]))

    made_here = source.run is not None and is_own(name)
    try:
        tokenizer = source.tokenizer if is_own(name) else tokenizers.read(beside[name])
    except ConfigError:
        if made_here:
            raise
        return found  # a published tokenizer is carried along, whether or not it is read here
    assert tokenizer is not None
    if made_here:
        found[name] = tokenizer.for_readers()
        if "tokenizer_config.json" not in beside:
            found["tokenizer_config.json"] = tokenizer.settings_for_readers()
    if not chat_template.exists(beside, read):
        found[chat_template.FILE] = chat_template.text(*tokenizer.mark_names)
    return found


def _of_folder(found: reader.Published) -> export.WeightSource:
    def stored(name: str) -> tuple[np.ndarray, np.ndarray] | None:
        tensor = found.tensors.get(name)
        if tensor is None or tensor.dtype != E4M3:
            return None
        found.read(name)  # refuses values that are not finite
        pair = tensor.array.copy(), found.tensors[name + names.SCALE].array.astype(np.float32)
        found.release(name)
        return pair

    def read(piece: names.Piece) -> np.ndarray:
        value = np.array(found.read(piece.name))
        found.release(piece.name)
        return value

    return export.WeightSource(found.config, found.layout, read, stored)


def _of_run(workdir: Path, config: ModelConfig, described: dict[str, Any]) -> export.WeightSource:
    masters = load.open_run(workdir, config)
    layout = config_json.tensor_layout(described)
    for weight in params.describe(abstract_model(config)):
        if not weight.trained and not layout.biased and masters(weight.path, ()).any():
            raise ConfigError(
                f"{workdir}: {weight.path} is not zero, and {described['model_type']} has no "
                "router biases; train with schedule.bias_speed=0"
            )

    def read(piece: names.Piece) -> np.ndarray:
        value = masters(piece.path, piece.index)
        bad = value.size - np.count_nonzero(np.isfinite(value))
        if bad:
            raise ConfigError(
                f"{workdir}: {piece.path}, which {piece.name} is part of, holds {bad} values of "
                f"{value.size} that are not finite there, expected none"
            )
        return piece.published(value)

    kept = workdir / carried.KEPT / carried.SCALES
    scales = safetensors.open_file(kept) if kept.is_file() else {}

    def former(name: str) -> np.ndarray | None:
        table = scales.get(name + names.SCALE)
        return None if table is None else table.array.astype(np.float32)

    return export.WeightSource(config, layout, read, former=former)


def _marks(source: Checkpoint, described: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of the marks around a text: from the settings beside the weights, or the tokenizer."""
    for known in (language_part.of(described), source.generation):
        if any(known.get(key) is not None for key in _MARKS):
            return {key: known.get(key) for key in _MARKS}
    if source.tokenizer is not None:
        found = source.tokenizer.marks
        return {"bos_token_id": found.bos, "eos_token_id": found.eos}
    return dict.fromkeys(_MARKS)


def _write_marks(folder: Path, marks: dict[str, Any]) -> None:
    """Writes generation_config.json if the marks are known and no such file was copied."""
    file = folder / "generation_config.json"
    if any(mark is not None for mark in marks.values()) and not file.exists():
        file.write_text(json.dumps({"_from_model_config": True, **marks}, indent=2) + "\n")
