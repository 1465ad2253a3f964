"""Conversion of a Hugging Face directory to a workdir, back, or to another published format.

A converted workdir holds weights and router biases alone, as step 0; training starts with fresh
moments and averages. Files beside the weights (tokenizer, generation settings) are copied.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.checkpoint import load
from deepseek_jax.checkpoint.hf import config_json, export, names, reader
from deepseek_jax.checkpoint.load import Checkpoint
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import Config, ConfigError, ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.precision.fp8_tiles import E4M3

CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
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
        if the checkpoint has one.

    Raises:
      ConfigError: values that loading refuses, or a target that cannot be written.
    """
    found = source.published
    if found is None:
        raise ConfigError(
            f"{source.directory} is a workdir already; expected a Hugging Face directory"
        )
    with _appears(target) as folder:
        data = base.data
        if (source.directory / "tokenizer.json").exists():
            data = dataclasses.replace(data, tokenizer=str(target.absolute() / "tokenizer.json"))
        config = dataclasses.replace(base, model=found.config, data=data)
        read, like = reader.parts_of(found), load.leaves_of(found.config)
        store = Store(folder / "checkpoints", keep=1)
        try:
            store.save_parts(0, like, lambda name, part: read(like[name], part), WEIGHTS_ONLY)
        finally:
            store.close()
        (folder / "config.json").write_text(config.to_json() + "\n")
        (folder / "config.py").write_text(_LAUNCHER)
        _carry(source.directory, folder)
        _write_marks(folder, {key: source.settings.get(key) for key in _MARKS})
    return config


def to_published(source: Checkpoint, target: Path, form: str, shard_bytes: int) -> None:
    """Makes a Hugging Face directory with the weights of a workdir, or of another such directory.

    Args:
      target: a folder that does not exist, or is empty.
      form: one of `export.FORMATS`.
      shard_bytes: the largest size of a file.

    Raises:
      ConfigError: values that loading refuses, a model without a published form, or a target that
        cannot be written.
    """
    with _appears(target) as folder:
        if source.published is not None:
            described, values = dict(source.settings), _of_folder(source.published)
        else:
            described = config_json.published(source.model)
            values = _of_run(source.directory, source.model, described)
        _carry(source.directory, folder)
        marks = _marks(source, described)
        _write_marks(folder, marks)
        described = config_json.in_format({**described, **marks}, form)
        export.write(folder, described, values, form, shard_bytes)


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

    return export.WeightSource(found.config, found.biased, read, stored)


def _of_run(workdir: Path, config: ModelConfig, described: dict[str, Any]) -> export.WeightSource:
    masters = load.open_run(workdir, config)
    biased = config_json.topk_method(described) == "noaux_tc"
    for weight in params.describe(abstract_model(config)):
        if not weight.trained and not biased and masters(weight.path, ()).any():
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

    return export.WeightSource(config, biased, read)


def _carry(source: Path, folder: Path) -> None:
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _marks(source: Checkpoint, described: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of the marks around a text: from the settings beside the weights, or the tokenizer."""
    for known in (described, source.generation):
        if any(known.get(key) is not None for key in _MARKS):
            return {key: known.get(key) for key in _MARKS}
    if source.tokenizer is not None:
        found = source.tokenizer.marks
        return {"bos_token_id": found.bos, "eos_token_id": found.eos}
    return {key: described.get(key) for key in _MARKS}


def _write_marks(folder: Path, marks: dict[str, Any]) -> None:
    """Writes generation_config.json if the marks are known and no such file was copied."""
    file = folder / "generation_config.json"
    if any(mark is not None for mark in marks.values()) and not file.exists():
        file.write_text(json.dumps({"_from_model_config": True, **marks}, indent=2) + "\n")


def check_target(target: Path) -> None:
    """Raises ConfigError unless the target is absent or an empty folder."""
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"target={target} exists and is not an empty folder; give another one")


@contextlib.contextmanager
def _appears(target: Path) -> Iterator[Path]:
    """Gives a folder beside the target to fill, and renames it to the target at the end.

    The folder's name follows from the target's, so that a later process finds and uses again what a
    killed one left. A lock keeps it from the folder of a process that still runs.
    """
    check_target(target)
    folder = target.parent / f".{target.name}.converting"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"target={target} cannot be written ({error.strerror})") from error
    try:
        _lock(lock, folder, target)
        try:
            _clear(folder)
            yield folder
            os.replace(folder, target)
        except BaseException as error:  # while the lock is held: later the name may be another's
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # one of them holds another process's file
                for path in made[1:]:
                    path.rmdir()
            if isinstance(error, OSError):
                raise ConfigError(f"target={target} cannot be written ({error})") from error
            raise
    finally:
        os.close(lock)  # releases the lock


def _lock(lock: int, folder: Path, target: Path) -> None:
    """Locks the folder; ConfigError if another process has it, or may have it."""
    wait = f"another process is making target={target}; wait for it or give another one"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(wait) from error
    except OSError as error:  # a file system without locks
        if any(folder.iterdir()):
            raise ConfigError(f"{wait}; if there is none, remove {folder}") from error
    if not folder.exists() or not os.path.samestat(os.fstat(lock), folder.stat()):
        raise ConfigError(wait)  # it was renamed or removed between opening and locking


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
