"""The text model of a checkpoint that holds other parts beside it, such as a vision tower.

Kimi K2.5 and its successors put the settings of the text model under `text_config` and its tensors
under `language_model.`. Only the text model is computed. Settings and tensors of the other parts
are carried along as they are, and come back beside the text model when it is written.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import shown

KEY, PREFIX = "text_config", "language_model."
WRAPPERS = {  # model types around a text model -> their architectures
    "kimi_k25": ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"),
    "kimi_vl": ("KimiVLForConditionalGeneration",),
}
# Keys that the text model takes from the outer settings where its own do not have them.
_SHARED = (
    "quantization_config", "torch_dtype", "dtype", "bos_token_id", "eos_token_id",
)  # fmt: skip

_INSIDE = "model.language_model."  # of the names that `transformers` has in memory
_TIED = "tie_word_embeddings"

T = TypeVar("T")


def is_wrapped(settings: Mapping[str, Any]) -> bool:
    """Whether published settings are those of a text model and other parts."""
    kind = settings.get("model_type")
    return isinstance(kind, str) and kind in WRAPPERS


def of(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of the text model: the whole where there are no other parts."""
    if not is_wrapped(settings):
        return settings
    own = settings.get(KEY)
    own = own if isinstance(own, dict) else {}
    shared = {key: settings[key] for key in _SHARED if settings.get(key) is not None}
    return {**shared, **{key: value for key, value in own.items() if value is not None}}


def check(settings: Mapping[str, Any], source: Path) -> None:
    """Raises ConfigError for settings around a text model that are not of a known form."""
    if not is_wrapped(settings):
        return
    if not isinstance(settings.get(KEY), dict):
        found = shown(settings[KEY]) if KEY in settings else "missing"
        raise ConfigError(f"{source}: {KEY} is {found}; expected the settings of the text model")
    if type(tied := settings.get(_TIED, False)) is not bool:
        raise ConfigError(f"{source}: {_TIED} is {shown(tied)}; expected true or false")
    named = settings.get("architectures") or []
    known = WRAPPERS[settings["model_type"]]
    if not isinstance(named, list) or any(name not in known for name in named):
        raise ConfigError(f"{source}: architectures is {shown(named)}; expected {[known[0]]!r}")


def is_tied(settings: Mapping[str, Any]) -> bool:
    """Whether the settings state one matrix for embedding and head, outside or in the text model.

    `transformers` follows the outer statement, and writes it beside an inner one that is false.
    """
    return any(place.get(_TIED) for place in (settings, of(settings)))


def untied(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the same model with an embedding and a head of its own."""
    if not is_tied(settings):
        return dict(settings)
    if is_wrapped(settings):
        settings = {**settings, KEY: {**settings[KEY], _TIED: False}}
    return {**settings, _TIED: False}


def replaced(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with some of the text model's keys changed.

    A key that is in the outer settings alone is changed there.
    """
    if not is_wrapped(settings):
        return {**settings, **changes}
    outer, inner = dict(settings), dict(settings[KEY])
    for key, value in changes.items():
        (outer if key in outer and key not in inner else inner)[key] = value
    return {**outer, KEY: inner}


def split(
    settings: Mapping[str, Any], tensors: Mapping[str, T]
) -> tuple[dict[str, T], dict[str, T]]:
    """Tensors of the text model under their own names, and those of the other parts."""
    if not is_wrapped(settings):
        return dict(tensors), {}
    text, others = {}, {}
    inside = any(name.startswith(_INSIDE) for name in tensors)
    for name, value in tensors.items():
        if name.startswith(PREFIX):
            text[_own(name)] = value
        elif inside and name.startswith((_INSIDE, "lm_head.")):
            text[name.replace(_INSIDE, "model.")] = value
        else:
            others[name] = value
    return text, others


def _own(name: str) -> str:
    """Name of a text model's tensor without the prefix.

    `transformers` 5.24 saves layers as "blocks": it undoes a renaming of the vision tower on all.
    """
    return re.sub(r"^model\.blocks\.", "model.layers.", name.removeprefix(PREFIX))


def prefix(settings: Mapping[str, Any]) -> str:
    """Beginning of the published names of the text model's tensors."""
    return PREFIX if is_wrapped(settings) else ""


def leaving_others(settings: Mapping[str, Any], others: Iterable[str]) -> dict[str, Any]:
    """Settings whose outer quantisation leaves modules of the other parts as they are.

    Args:
      others: names of the other parts' tensors.
    """
    quantised = settings.get("quantization_config")
    if not is_wrapped(settings) or not quantised:
        return dict(settings)
    key = "modules_to_not_convert"
    # `transformers` saves one of the projector's norms below `model.`, as if of the text model.
    found = (re.match(r"(model\.)?[^.]+", name) for name in others)
    own = sorted({module[0] for module in found if module})
    modules = dict.fromkeys([*(quantised.get(key) or ()), *own])
    return {**settings, "quantization_config": {**quantised, key: list(modules)}}
