"""The folder of a run: checks before anything is written, and the files that mark it."""

import json
import logging
import platform
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.checkpoint import carried
from deepseek_jax.config import Config, ConfigError, load_json
from deepseek_jax.config.hints import shown
from deepseek_jax.config.renamed import with_new_names
from deepseek_jax.data import files
from deepseek_jax.data.corpus import Corpus
from deepseek_jax.errors import RunError, reason
from deepseek_jax.train.lock import Lock
from deepseek_jax.train.metrics import METRICS

CHECKPOINTS = "checkpoints"

_log = logging.getLogger(__name__)

# Keys that a run may not change on the way, since its checkpoints and the position in its data
# would mean something else. The text is compared with the checkpoint, so its path may change.
FIXED = (
    "seed", "model", "data.tokenizer", "data.text_key", "data.fim_rate", "data.held_out",
    "batch.length", "optimizer.moments", "optimizer.name",
)  # fmt: skip

_LONGEST = 200  # characters of a value in a message


def check(directory: Path, config: Config) -> None:
    """Raises ConfigError where `directory` is another run's; changes nothing."""
    carried.check_tokenizer(directory, config.data)
    kept = directory / "config.json"
    if not kept.exists():
        if any(path.name.isdecimal() for path in (directory / CHECKPOINTS).glob("*")):
            raise ConfigError(
                f"--workdir={directory} holds checkpoints but no config.json to tell whose they "
                "are; give another folder"
            )
        return
    before = _kept(kept)
    now = json.loads(config.to_json())
    free = {"data.tokenizer"} if _may_set_tokenizer(directory, before) else set()
    if _holds_weights_alone(directory):
        free |= set(FIXED) - {"seed", "model", "data.tokenizer"}  # and no text was read
    for key in (key for key in FIXED if key not in free):
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


def of_this_python(config: Config) -> dict[str, str]:
    """Version of the running Python, kept in a checkpoint where its library is the text."""
    return {} if config.data.path else {"python": platform.python_version()}


def check_library(config: Config, meta: dict[str, Any] | None) -> None:
    """Raises ConfigError where the text of data.path='' was the library of another Python.

    Args:
      meta: of the newest checkpoint, if there is one.
    """
    made, now = (meta or {}).get("python"), of_this_python(config).get("python")
    if made and now and made != now:
        raise ConfigError(
            f"data.path='' is the running Python's library; this run was made with Python {made}, "
            f"and this is Python {now}. Resume it with Python {made}, or begin a new workdir, with "
            "--config.data.path=FOLDER for a text that is the same under every Python"
        )


def claim(directory: Path, config: Config, corpus: Corpus) -> None:
    """Claims the workdir by writing `config.json` and `tokenizer.json`, each by one rename."""
    if jax.process_index() != 0:
        return
    try:
        if corpus.tokenizer is not None:
            corpus.tokenizer.save(directory / "tokenizer.json")
        files.replace(directory / "config.json", config.to_json() + "\n")
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ConfigError(f"--workdir={directory} cannot be written ({reason(error)})") from error


def watch(lock: Lock, saved: int, config: Config, corpus: Corpus) -> None:
    """Sees that the folder is still whole, before the run writes to it; for process 0.

    A `config.json` or `tokenizer.json` that is gone is written again.

    Args:
      saved: the newest checkpoint; 0 without one.

    Raises:
      RunError: the folder, its rows or its checkpoints are gone.
    """
    lock.check()
    for name in (METRICS, CHECKPOINTS) if saved else (METRICS,):
        path = lock.directory / name
        if _is_gone(path, folder=name == CHECKPOINTS):
            raise RunError(
                f"{path} was removed or replaced while this run went on, so it stops and "
                "writes nothing more. Put it back, and the same command goes on from the newest "
                "checkpoint; or start again in another --workdir"
            )
    names = ["config.json"] + ["tokenizer.json"] * (corpus.tokenizer is not None)
    if gone := [name for name in names if _is_gone(lock.directory / name)]:
        claim(lock.directory, config, corpus)
        _log.warning("%s: wrote %s again, which was removed", lock.directory, " and ".join(gone))


def _is_gone(path: Path, *, folder: bool = False) -> bool:
    """Whether there is nothing at `path`, or a file for a folder, or a folder for a file."""
    try:
        return stat.S_ISDIR(path.stat().st_mode) != folder
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # says nothing about the file
        pass
    return False


def _may_set_tokenizer(directory: Path, before: Any) -> bool:
    """Whether a workdir of `convert` waits for a tokenizer that the weights came without."""
    waits = _at(before, "data.tokenizer") in carried.MADE_ANEW
    return waits and carried.began_from_weights(directory)


def _holds_weights_alone(directory: Path) -> bool:
    """Whether `convert` made the workdir and no run has saved a step: it has no moments then."""
    steps = [path.name for path in (directory / CHECKPOINTS).glob("*") if path.name.isdecimal()]
    return steps == ["0"]


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
