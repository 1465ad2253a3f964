"""Begin and end marks that settings beside a tokenizer.json state, whatever their names are.

`tokenizer_config.json` names them; `generation_config.json` and `config.json` give their ids. The
first of the three that knows a mark of the tokenizer counts. Where `tokenizer_config.json` says
that there is no begin mark, the other two are not asked for it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.config import ConfigError

FILES = ("tokenizer_config.json", "generation_config.json", "config.json")
KINDS = ("bos", "eos")

Settings = Sequence[Mapping[str, Any]]  # contents of FILES, {} for one that is absent


def beside(tokenizer: Path) -> Settings:
    """Contents of the settings beside a tokenizer.json.

    Raises:
      ConfigError: a file that is no JSON object.
    """
    return [_object(tokenizer.with_name(name)) for name in FILES]


def _object(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"data.tokenizer: {file} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"data.tokenizer: {file} holds no JSON object")
    return value


def stated(settings: Settings, kind: str) -> list[str | int]:
    """Names and ids that the settings give for the mark of a kind, in their order."""
    found: list[str | int] = []
    for number, values in enumerate(settings):
        name = values.get(f"{kind}_token")
        name = name.get("content") if isinstance(name, dict) else name
        if isinstance(name, str):
            found.append(name)
        elif number == 0 and f"{kind}_token" in values and kind == "bos":
            return []
        ids = values.get(f"{kind}_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        found += [value for value in ids if type(value) is int]
    return found


def find(
    stated_marks: Sequence[str | int],
    id_of: Callable[[str], int | None],
    name_of: Callable[[int], str | None],
) -> int | None:
    """Id of the first of the stated marks that a tokenizer has; None if it has none of them."""
    for mark in stated_marks:
        if isinstance(mark, str):
            if (number := id_of(mark)) is not None:
                return number
        elif 0 <= mark < 2**32 and name_of(mark) is not None:
            return mark
    return None


def without_bos(settings: Settings) -> bool:
    """Whether `tokenizer_config.json` says that there is no begin mark."""
    return "bos_token" in settings[0] and settings[0]["bos_token"] is None


def for_readers(bos: str | None, eos: str, pad: str | None) -> dict[str, Any]:
    """A tokenizer_config.json with which other readers begin and end texts with these marks."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad or eos,
        "add_bos_token": bos is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
