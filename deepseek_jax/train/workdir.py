"""The folder of a run: checks before anything is written, and the files that mark it."""

import json
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.config import Config, ConfigError
from deepseek_jax.config.renamed import with_new_names
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
    "batch.length", "optimizer.moments",
)  # fmt: skip


def check(directory: Path, config: Config) -> None:
    """Raises ConfigError where `directory` is another run's; changes nothing."""
    kept = directory / "config.json"
    if not kept.exists():
        if any(path.name.isdigit() for path in (directory / CHECKPOINTS).glob("*")):
            raise ConfigError(
                f"--workdir={directory} holds checkpoints but no config.json to tell whose they "
                "are; give another folder"
            )
        return
    try:
        before = json.loads(kept.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{kept} is not readable JSON ({error}); give another --workdir"
        ) from error
    if isinstance(before, dict):
        before = with_new_names(before)
    now = json.loads(config.to_json())
    for key in FIXED:
        for name, was, is_now in _differences(_at(before, key), _at(now, key), key):
            raise ConfigError(
                f"--workdir={directory} holds a run with {name}={was!r}, and this config has "
                f"{is_now!r}; give another --workdir, or set --config.{name}={was!r} to go on"
            )


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
            corpus.tokenizer.save(directory / "tokenizer.json.new")
            os.replace(directory / "tokenizer.json.new", directory / "tokenizer.json")
        (directory / "config.json.new").write_text(config.to_json() + "\n")
        os.replace(directory / "config.json.new", directory / "config.json")
    except Exception as error:  # the tokenizers library raises bare Exception
        for name in ("tokenizer.json.new", "config.json.new"):
            (directory / name).unlink(missing_ok=True)
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
        if _is_gone(lock.directory / name):
            raise RunError(
                f"{lock.directory / name} was removed while this run went on, so it stops and "
                "writes nothing more. Put it back, and the same command goes on from the newest "
                "checkpoint; or start again in another --workdir"
            )
    names = ["config.json"] + ["tokenizer.json"] * (corpus.tokenizer is not None)
    if gone := [name for name in names if _is_gone(lock.directory / name)]:
        claim(lock.directory, config, corpus)
        _log.warning("%s: wrote %s again, which was removed", lock.directory, " and ".join(gone))


def _is_gone(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # says nothing about the file
        pass
    return False


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
