"""Models of other families, refused by name with what they need; see docs/neighbours.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.config import ConfigError

_V4 = (
    "it has no key-value latent and no groups of experts, but one key-value head over compressed "
    "positions, four mixed residual streams, and layers routed by token id"
)
# model_type -> what the model has that is not computed here.
NEIGHBOURS = {
    "deepseek_v4": _V4,
    "deepseek_v41": f"{_V4}; and n-gram tables",
    "deepseek_ocr2": "its text model has plain attention, without a key-value latent",
    "deepseek_vl": "its text model has plain attention, without a key-value latent",
    "glm_moe_dsa": "its sparse attention shares the positions of one layer's indexer with others",
    "hy_v4": "it has gated latent attention with learned sinks, and mixed residual streams",
    "kimi_linear": "most of its layers have linear attention (KDA) with a recurrent state",
    "longcat_flash": "its layers have two attentions beside one mixture, and experts of no weights",
}


def refuse(settings: Mapping[str, Any], source: Path) -> None:
    """Raises ConfigError for settings of a known model of another family."""
    kind = settings.get("model_type")
    if isinstance(kind, str) and kind in NEIGHBOURS:
        raise ConfigError(
            f"{source}: model_type is {kind!r}, another model: {NEIGHBOURS[kind]} "
            "(docs/neighbours.md)"
        )
