"""Modules and weights of a layer, by the step of a layer pass that reads them."""

import dataclasses
from typing import Any

import numpy as np


def block_modules(block: Any) -> dict[str, Any]:
    """The modules of a MoE `Block` by name, as `layer_weights` reads them."""
    modules = {name: getattr(block, name) for name in ("attention_norm", "attention", "feed_norm")}
    modules |= {name: getattr(block.feed, name) for name in ("router", "experts")}
    if block.feed.config.shared_experts:
        modules["shared"] = block.feed.shared
    return modules


def layer_weights(modules: dict[str, Any]) -> dict[str, Any]:
    """Weights by the step of a layer pass that reads them; None for a step that there is not."""
    norm, shared = modules["feed_norm"], modules.get("shared")
    wide = (modules["dense"],) if "dense" in modules else ()
    return {
        "attend": (modules["attention_norm"], modules["attention"]),
        "gate": (norm, modules["router"]),
        "experts": modules["experts"].weights(),
        "shared": (norm, shared, *wide) if shared is not None or wide else None,
    }


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """The kind of a layer, which a device may know only at run time.

    Attributes:
      routed: () bool, whether tokens go to experts at all.
      dense: () bool, whether the wide network of a dense layer replaces the shared experts.
    """

    routed: Any
    dense: Any


MOE_LAYER = LayerKind(routed=np.True_, dense=np.False_)
