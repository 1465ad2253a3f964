"""Weights of a model in the slots of a rank's chunks, and their gradients back at the masters."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.overlapped.layer_modules import LayerKind
from deepseek_jax.model.overlapped.stage import LayerSlot
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.parallel.pipeline.stage_assignment import LayerAssignment


@dataclasses.dataclass(frozen=True)
class _Part:
    """Part of a slot, and the stacks of layers that it comes from.

    Attributes:
      first: number of the first of these layers in the model.
      stacks: (module, attribute, number of layers) of each stack.
    """

    first: int
    stacks: list[tuple[Any, str, int]]

    @property
    def layers(self) -> list[int]:
        """Number of layers in each stack."""
        return [count for _, _, count in self.stacks]

    def rows(self, where: LayerAssignment) -> np.ndarray:
        """[rank, chunk * slot] -> index into the stacks, one after another."""
        return where.rows(self.first, sum(self.layers))


def _parts(model: Any, config: ModelConfig) -> dict[str, _Part]:
    dense, mixture, feed = config.dense_layers, model.moe_layers, model.moe_layers.feed
    parts = {}
    for name in ("attention_norm", "attention", "feed_norm"):  # what all layers have
        stacks = [(model.dense_layers, name, dense)] if dense else []
        parts[name] = _Part(0, [*stacks, (mixture, name, config.moe_layers)])
    for name in ("router", "experts", *(["shared"] if config.shared_experts else [])):
        parts[name] = _Part(dense, [(feed, name, config.moe_layers)])
    if dense:
        parts["dense"] = _Part(0, [(model.dense_layers, "feed", dense)])
    return parts


def fetch_stage_params(
    model: Any, where: LayerAssignment, config: ModelConfig, layout: Layout
) -> dict[str, Any]:
    """Weights of this rank by part, stacked over the slots of chunk 0, then of chunk 1 if any."""
    return {
        name: params.to_stages(
            [getattr(owner, attribute) for owner, attribute, _ in part.stacks],
            part.rows(where),
            layout,
        )
        for name, part in _parts(model, config).items()
    }


def slots(
    rows: dict[str, Any], where: LayerAssignment, chunk: int, config: ModelConfig
) -> list[LayerSlot]:
    """Slots of one chunk, with this rank's weights as `fetch_stage_params` gathered them."""
    out, rank = [], lax.axis_index("pipe")
    for slot in range(where.slots):
        row, layer = chunk * where.slots + slot, where.layers[:, :, slot]  # [rank, chunk]
        dense, routed = (layer >= 0) & (layer < config.dense_layers), layer >= config.dense_layers
        modules = {
            name: jax.tree.map(operator.itemgetter(row), part)
            for name, part in rows.items()
            if name != "dense" or dense[:, chunk].any()
        }
        kind = LayerKind(*(jnp.asarray(known[:, chunk])[rank] for known in (routed, dense)))
        out.append(LayerSlot(modules, kind))
    return out


def return_gradients(
    model: Any,
    gradients: list[list[dict[str, Any]]],
    end_gradients: Any,
    where: LayerAssignment,
    config: ModelConfig,
    layout: Layout,
) -> nnx.State:
    """Gradients of the masters, from those of all chunks' slots and of the ends."""
    slots = [slot for chunk in gradients for slot in chunk]
    for name, part in _parts(model, config).items():
        known = next(slot[name] for slot in slots if name in slot)
        each = [slot.get(name, jax.tree.map(jnp.zeros_like, known)) for slot in slots]
        stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *each)
        masters = params.from_stages(stacked, part.rows(where), part.layers, layout)
        for (owner, attribute, _), value in zip(part.stacks, masters, strict=True):
            setattr(owner, attribute, value)
    reduced = params.reduce_gradients(end_gradients, layout, scattered=False)
    for name in _ends(config):
        setattr(model, name, getattr(reduced, name))
    parts: Any = nnx.split(model, nnx.Param, ...)
    return parts[1]


def ends(model: Any) -> Any:
    """Model without its layers: embedding, final norm, head and MTP modules."""
    config = dataclasses.replace(model.config, layers=0, dense_layers=0)
    out: Any = abstract_model(config)
    for name in _ends(config):
        setattr(out, name, getattr(model, name))
    return out


def _ends(config: ModelConfig) -> tuple[str, ...]:
    return ("embedding", "norm", "head", *(["mtp"] if config.mtp_depth else []))
