"""The folder of a run: checks before anything is written, and the files that mark it."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.checkpoint import carried
from deepseek_jax.config import Config, ConfigError, load_json
from deepseek_jax.config.hints import shown
from deepseek_jax.config.renamed import with_new_names
from deepseek_jax.data.corpus import Corpus

# Keys that a run may not change on the way, since its checkpoints and the position in its data
# would mean something else. The text is compared with the checkpoint, so its path may change.
FIXED = (
    "seed", "model", "data.tokenizer", "data.text_key", "data.fim_rate", "data.held_out",
    "batch.length", "optimizer.moments",
)  # fmt: skip

_LONGEST = 200  # characters of a value in a message


def check(directory: Path, config: Config) -> None:
    """Raises ConfigError where `directory` is another run's or not writable; changes nothing."""
    existing = next(p for p in (directory, *directory.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise ConfigError(f"--workdir={directory}: {existing} is no folder; give another one")
    if jax.process_index() == 0:
        _try_to_write(directory)
    carried.check_tokenizer(directory, config.data)
    kept = directory / "config.json"
    if not kept.exists():
        if (directory / "checkpoints").exists() and any((directory / "checkpoints").iterdir()):
            raise ConfigError(
                f"--workdir={directory} holds checkpoints but no config.json to tell whose they "
                "are; give another folder"
            )
        return
    before = _kept(kept)
    now = json.loads(config.to_json())
    fixed = [
        key for key in FIXED if key != "data.tokenizer" or not _may_set_tokenizer(directory, before)
    ]
    for key in fixed:
        for name, was, is_now in _differences(_at(before, key), _at(now, key), key):
            kept_value, new_value = shown(was, _LONGEST), shown(is_now, _LONGEST)
            raise ConfigError(
                f"--workdir={directory} holds a run with {name}={kept_value}, and this config has "
                f"{new_value}; give another --workdir, or set --config.{name}={kept_value} to go on"
            )


def _kept(file: Path) -> dict[str, Any]:
    """Content of the `config.json` of a run, under the names of today."""
    try:
        values = with_new_names(load_json(file.read_text(), str(file)))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        why = str(error) if isinstance(error, ConfigError) else f"{file} is not readable ({error})"
        raise ConfigError(f"{why}; give another --workdir") from error
    sections = sorted({key.split(".")[0] for key in FIXED} - {"seed"})
    for name in sections:
        if not isinstance(values.get(name), dict):
            raise ConfigError(
                f"{file} is not the config of a run: {name} is {shown(values.get(name))}, expected "
                "a section; give another --workdir"
            )
    return values


def claim(directory: Path, config: Config, corpus: Corpus) -> None:
    """Claims the workdir by writing `config.json` and `tokenizer.json`, each by one rename."""
    if jax.process_index() != 0:
        return
    directory.mkdir(parents=True, exist_ok=True)
    if corpus.tokenizer is not None:
        corpus.tokenizer.save(directory / "tokenizer.json.new")
        os.replace(directory / "tokenizer.json.new", directory / "tokenizer.json")
    (directory / "config.json.new").write_text(config.to_json() + "\n")
    os.replace(directory / "config.json.new", directory / "config.json")


def _try_to_write(directory: Path) -> None:
    """Writes a file and removes it: permissions do not tell of full disks and read-only mounts."""
    made: list[Path] = []
    try:
        for folder in reversed((directory, *directory.parents)):
            if not folder.is_dir():
                folder.mkdir(exist_ok=True)
                made.append(folder)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise ConfigError(
            f"--workdir={directory} cannot be written ({error.strerror}); give another folder"
        ) from error
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another run may have started in it
                folder.rmdir()


def _may_set_tokenizer(directory: Path, before: Any) -> bool:
    """Whether a workdir of `convert` waits for a tokenizer that the weights came without."""
    waits = _at(before, "data.tokenizer") in carried.MADE_ANEW
    return waits and carried.began_from_weights(directory)


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _differences(was: Any, now: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            yield from _differences(was.get(key), now.get(key), f"{name}.{key}")
    elif was != now:
        yield name, was, now
