"""Bytes per device of all that a training run keeps, from the abstract model: no devices needed.

The places are those that training uses, `Layout.spec`, `Layout.storage` and the `LayerAssignment`
of layers in a pipeline, so that what is predicted here is what gets allocated.
"""

import collections
import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import Config
from deepseek_jax.model import params
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.parallel import mesh
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.parallel.pipeline import stage_assignment
from deepseek_jax.precision.recipes import recipe

COUNTERS = 2 * 4  # the step and Adam's count, int32


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, unless said otherwise. Temporaries and activations are not in it.

    Attributes:
      masters: float32 parameters, in the storage layout.
      router_bias: float32, whole on every device.
      compute_weights: what matmuls read beside the masters: a copy as the recipe prepares it
        (sensitive weights stay float32), whole for the step with layout.zero 0 and 1, split like
        the masters with 3. A weight of its master's bytes and layout needs no copy. In a pipeline:
        the layers in the slots of a rank's chunks, zeros where a slot is empty, and on every rank
        what stands before the first layer and after the last.
      gathered_layer: with layout.zero=3, the largest of one layer, table or MTP module, gathered.
      gradients: float32 sums over micro-batches, in the layout of `compute_weights`.
      reduced_gradients: float32, in the storage layout: what the optimiser receives, for weights
        whose gradients are scattered, or go home from a pipeline's slots; the others are summed
        where they are.
      moments: both of Adam's, in optimizer.moments, in the storage layout.
      counters: the step and Adam's count.
      ema_host: float32 average of the masters, in host memory; 0 where it is off.
    """

    masters: int
    router_bias: int
    compute_weights: int
    gathered_layer: int
    gradients: int
    reduced_gradients: int
    moments: int
    counters: int
    ema_host: int

    @property
    def state(self) -> int:
        """What lives in device memory between two steps."""
        return self.masters + self.router_bias + self.moments + self.counters

    @property
    def total(self) -> int:
        """State, compute weights and gradients."""
        weights = self.compute_weights + self.gathered_layer
        return self.state + weights + self.gradients + self.reduced_gradients


def memory(config: Config) -> Memory:
    """Of any device, for all run one program and hold as much; `config.mesh` must have no -1.

    Raises:
      ConfigError: ranks of a pipeline, or layers of its stages, that do not fit.
    """
    layout, float32 = mesh.layout(config), 4
    per_layer, where = (
        layout.zero == 3,
        stage_assignment.assign_layers(config) if config.mesh.pipe > 1 else None,
    )
    prepared_bytes = recipe(config.precision.recipe).prepared_bytes
    moment = jnp.dtype(config.optimizer.moments).itemsize
    stored = bias = compute = gradients = reduced = 0
    gathered: dict[str, int] = collections.defaultdict(int)
    for weight in params.describe(abstract_model(config.model)):
        layers = weight.shape[0] if "layer" in weight.axes else 1
        mine_shape = local_shape(weight.shape, layout.storage(weight.axes, weight.shape), layout)
        whole_shape = local_shape(weight.shape, layout.spec(weight.axes), layout)
        mine, whole = math.prod(mine_shape), math.prod(whole_shape)
        prepared = prepared_bytes(whole_shape, sensitive=weight.sensitive)
        stored += mine if weight.trained else 0
        bias += 0 if weight.trained else float32 * whole
        if where and (rows := _rows(config, where, weight.path)):
            fetched, summed = rows
            compute += fetched * prepared // layers
            gradients += summed * float32 * whole // layers
            reduced += float32 * mine if weight.trained else 0
        elif weight.trained:
            kept_shape = mine_shape if per_layer else whole_shape
            kept = math.prod(kept_shape)
            copied = prepared_bytes(kept_shape, sensitive=weight.sensitive)
            compute += copied if (kept, copied) != (mine, float32 * mine) else 0
            gradients += float32 * kept
            reduced += float32 * mine if kept != mine else 0
            if per_layer and whole != mine:
                gathered[weight.path.split(".")[0]] += prepared // layers
        elif where:  # the executor's sums have a zero for each bias
            gradients += float32 * whole
    return Memory(
        masters=float32 * stored,
        router_bias=bias,
        compute_weights=compute,
        gathered_layer=max(gathered.values(), default=0),
        gradients=gradients,
        reduced_gradients=reduced,
        moments=2 * moment * stored,
        counters=COUNTERS,
        ema_host=float32 * stored if config.optimizer.ema_decay else 0,
    )


def _rows(
    config: Config, where: stage_assignment.LayerAssignment, path: str
) -> tuple[int, int] | None:
    """Layers of a weight that a rank of a pipeline fetches, and that it sums gradients of.

    None for a weight of no layer. Every slot has all that a MoE layer has, and a dense layer puts
    its norms and attention there; its network is summed in those slots of a chunk alone that have
    one on some rank.
    """
    top, part, *_ = path.split(".")
    every = where.chunks * where.slots
    if top == "moe_layers":
        return every, every
    if top != "dense_layers":
        return None
    if part != "feed":
        return 0, 0  # counted with the MoE layers'
    dense = (where.layers != stage_assignment.NOTHING) & (where.layers < config.model.dense_layers)
    return every, int(dense.any(axis=0).sum())


def local_shape(shape: tuple[int, ...], spec: P, layout: Layout) -> tuple[int, ...]:
    """Shape of one device's part of an array of `shape` that lives as `spec`."""
    parts = (*spec, *(None,) * (len(shape) - len(spec)))
    names = [(part,) if isinstance(part, str) else part or () for part in parts]
    return tuple(
        size // math.prod(layout.sizes[name] for name in over)
        for size, over in zip(shape, names, strict=True)
    )
