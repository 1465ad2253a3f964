"""Bytes that a layer keeps for backward, per token: counted from shapes; nothing is compiled.

The layer is a MoE layer as a pipeline stage runs it, on one device, which gets as many copies of
tokens as each device of an expert-parallel group does when all experts are equally loaded. With two
hops a stage keeps fewer: tokens as received over the slow hop. BF16 stands beside FP8, with tokens
that travel as they are and in FP8.
"""

import dataclasses
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.plan import residual_trace

RECIPES = (("bfloat16", "compute"), ("bfloat16", "fp8"), ("fp8", "fp8"))  # and its dispatch
CORE = 4  # rank of attention scores, which `recompute=none` keeps in every recipe


def measure(config: Config) -> dict[str, Any]:
    """Rows by policy and recipe: bytes per token, and their share of the policy's first recipe.

    Scores of the attention core, which no recipe keeps in FP8, are a column of their own.
    """
    rows: list[dict[str, Any]] = []
    for recompute in ("report", "attention", "none"):
        first: float | None = None
        for recipe, dispatch in RECIPES:
            kept = kept_bytes(_with(config, recompute, recipe, dispatch))
            tokens = config.batch.length
            each = {name: size / tokens for name, size in kept.items()}
            first = first or each["kept"]
            named = {"recompute": recompute, "recipe": recipe, "dispatch": dispatch}
            rows.append({**named, **each, "share": each["kept"] / first})
    return {"layer": rows}


def kept_bytes(config: Config) -> dict[str, int]:
    """Bytes that one sequence leaves for backward of one MoE layer, besides its weights.

    Returns:
      Of attention scores as "scores", and of all others as "kept".
    """
    sizes = {"kept": 0, "scores": 0}
    for leaf in residual_trace.of_layer_pass(_alone(config)):
        scores = leaf.ndim == CORE and leaf.shape[1] == config.model.heads
        sizes["scores" if scores else "kept"] += residual_trace.nbytes(leaf)
    return sizes


def _with(config: Config, recompute: str, recipe: str, dispatch: str) -> Config:
    """The config with a policy, a recipe and a payload of tokens."""
    return dataclasses.replace(
        config,
        layout=dataclasses.replace(config.layout, recompute=recompute),
        precision=dataclasses.replace(config.precision, recipe=recipe, dispatch=dispatch),
    )


def _alone(config: Config) -> Config:
    """The config with one sequence on one device."""
    one = dict.fromkeys(("pipe", "replica", "node", "gpu", "tensor"), 1)
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **one),
        batch=dataclasses.replace(config.batch, micro_sequences=1),
    )
