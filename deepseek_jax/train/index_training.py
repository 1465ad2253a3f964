"""Training of V3.2's indexers (section 2.1.1 of the DeepSeek-V3.2-Exp report), in two phases.

    schedule.index_phase   warm_up                        sparse
    attention              to all positions               to those that are selected
    loss of an indexer     KL over all positions          KL over those that are selected
    trained                the indexers alone             all weights

The loss of an indexer moves its own weights alone, and no other loss moves them: its inputs and the
attention that it follows are detached. It is a sum over queries in the report; here it is a mean
over the queries of a step, times `schedule.index_weight`, and a sum over layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.model import execution
from deepseek_jax.model.execution import Execution
from deepseek_jax.precision.recipes import Recipe


def in_training(config: Config, recipe: Recipe | None = None) -> Execution:
    """`execution.of` with the loss of the indexers that a training step computes."""
    how = execution.of(config, recipe)
    trained = config.model.index_heads and config.schedule.index_weight
    return dataclasses.replace(how, index_loss=config.schedule.index_phase) if trained else how


def index_weight(config: Config, sequences: jax.Array) -> jax.Array | None:
    """Weight of a query's loss in the objective of a step; None where no loss is computed."""
    if in_training(config).index_loss == "none":
        return None
    return config.schedule.index_weight / (sequences * config.batch.length)


def of_indexers(tree: Any) -> Any:
    """Gradients or updates of the indexers, and zeros in place of all others."""
    return _by_path(tree, lambda own, leaf: leaf if own else jnp.zeros_like(leaf))


def stopped_but_indexers(tree: Any) -> Any:
    """Weights of which those of the indexers alone have a gradient."""
    return _by_path(tree, lambda own, leaf: leaf if own else jax.lax.stop_gradient(leaf))


def is_of_indexer(path: Any) -> bool:
    """Whether a path in a tree of parameters is that of an indexer's weight."""
    return "indexer" in (str(getattr(key, "name", getattr(key, "key", ""))) for key in path)


def _by_path(tree: Any, choose: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: choose(is_of_indexer(path), leaf), tree
    )
