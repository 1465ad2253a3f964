"""A small model and engines for it, over the first few of the eight devices."""

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import small

from deepseek_jax import command
from deepseek_jax.checkpoint import load
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.data import tokenizer
from deepseek_jax.model import params
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.transformer import Transformer, abstract_model
from deepseek_jax.serve import generation
from deepseek_jax.serve.engine import Engine

HOW = Execution()
TINY = Path(__file__).parent / "fixtures/hf_tiny"


@functools.cache
def model(depth: int = 0, vocab: int = 64, index_top_k: int = 0) -> Transformer:
    """One dense and one MoE layer; a wide init keeps the likely tokens apart.

    Args:
      index_top_k: positions that V3.2's indexer chooses; 0 for a model without one.
    """
    indexer = small.indexer(index_top_k) if index_top_k else {}
    config = small.config(model_mtp_depth=depth, model_vocab=vocab, **indexer).model
    abstract, rng = abstract_model(config), np.random.default_rng(1)

    def drawn(weight: params.Weight) -> np.ndarray:
        if weight.path.endswith("scale"):
            return np.ones(weight.shape, np.float32)
        return rng.normal(size=weight.shape).astype(np.float32) * 0.3 * weight.trained

    leaves = [jnp.asarray(drawn(weight)) for weight in params.describe(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def server(
    model: Transformer,
    sizes: Mapping[str, int] | None = None,
    zero: int = 0,
    unroll: int = 1,
    rules: Any = small.RULES,
    **changes: Any,
) -> Engine:
    mesh, layout = small.mesh_of(sizes or {}), small.layout_of(sizes or {}, zero, rules)
    places = [load.place(w, layout, mesh) for w in params.describe(model)]
    leaves, tree = jax.tree.flatten(model)
    placed = jax.tree.unflatten(tree, jax.device_put(leaves, places))
    settings = {"slots": 2, "length": 48, "cache": "float32"} | changes
    how = dataclasses.replace(HOW, unroll=unroll)
    return Engine(placed, how, layout, mesh, **settings)


def fill(folder: Path) -> Path:
    """The fixture, with a tokenizer of bytes beside it, in an empty folder."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(TINY / name, folder / name)
    tokenizer.make("byte", vocab=512, texts=()).save(folder / "tokenizer.json")
    return folder


def opened(folder: Path) -> Engine:
    """Engine of a checkpoint, as the command opens it."""
    base = command.default_config()
    base = dataclasses.replace(base, layout=dataclasses.replace(base.layout, unroll=1))
    room = dict(slots=2, length=32, cache="float32", stop=(), drafts=0)
    return generation.open_engine(open_checkpoint(folder), base, mesh={}, **room)
