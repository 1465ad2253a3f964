"""Estimated bytes per device of a training run, from the abstract model; no devices needed.

Placements are those of training, `Layout.spec`, `Layout.storage` and the `LayerAssignment` of a
pipeline, so that the estimate equals the allocation.
"""

import collections
import dataclasses
import functools
import itertools
import math

import jax.numpy as jnp

from deepseek_jax.config import Config, layers_per_stage
from deepseek_jax.model.count import weights
from deepseek_jax.parallel import mesh
from deepseek_jax.parallel.pipeline import stage_assignment
from deepseek_jax.precision.fp8_weights import Linear
from deepseek_jax.precision.recipes import recipe

COUNTERS = 2 * 4  # bytes of the step and of Adam's count, int32
MUON_COUNTERS = 4 + 3 * 4  # of Muon's count, and of its three coefficients


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a training run on one device, without temporaries and activations.

    Attributes:
      masters: Master weights, float32, in the storage layout.
      router_bias: Router biases, float32, replicated.
      compute_weights: Weights as the recipe prepares them (sensitive weights in float32): gathered
        for the step with layout.zero 0 and 1, sharded like the masters with 3. A weight whose bytes
        and layout equal its master's needs no copy. In a pipeline: the layer slots of the rank's
        chunks, zeros in an empty slot, and embedding, MTP modules and head on all ranks.
      gathered_layer: Largest gathered layer, embedding, head or MTP module with layout.zero=3.
      gradients: Sums over micro-batches, float32, in the layout of `compute_weights`.
      reduced_gradients: Gradients that the optimiser receives, float32, in the storage layout,
        where they are not summed in place: reduce-scattered ones, and those of a pipeline's slots.
      moments: Both moments of Adam, or one where Muon moves the weight, in optimizer.moments, in
        the storage layout.
      counters: Step and Adam's count.
      ema_host: Average of the masters, float32, in host memory; 0 with optimizer.ema_decay=0.
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
        """Bytes of device memory between two steps."""
        return self.masters + self.router_bias + self.moments + self.counters

    @property
    def total(self) -> int:
        """Bytes of state, compute weights and gradients."""
        weights = self.compute_weights + self.gathered_layer
        return self.state + weights + self.gradients + self.reduced_gradients


def memory(config: Config) -> Memory:
    """Estimates the memory of a device; all devices run one program and need as much.

    Args:
      config: Config of the run, whose mesh has no -1.

    Raises:
      ConfigError: Ranks of a pipeline, or layers of its stages, that do not fit.
    """
    layout, float32 = mesh.layout(config), 4
    per_layer = layout.zero == 3
    rows = _stage_rows(config) if config.mesh.pipe > 1 else {}
    prepared_bytes = functools.partial(_prepared_bytes, config.precision.recipe)
    moment = jnp.dtype(config.optimizer.moments).itemsize
    muon = config.optimizer.name == "muon"
    stored = squares = bias = compute = gradients = reduced = 0
    gathered: dict[str, int] = collections.defaultdict(int)
    for weight in weights(config.model):
        layers = weight.shape[0] if "layer" in weight.axes else 1
        mine_shape = layout.local(layout.storage(weight.axes, weight.shape), weight.shape)
        whole_shape = layout.local(layout.spec(weight.axes), weight.shape)
        mine, whole = math.prod(mine_shape), math.prod(whole_shape)
        prepared = prepared_bytes(
            whole_shape, sensitive=weight.sensitive, linear=weight.linear(whole_shape)
        )
        stored += mine if weight.trained else 0
        # Muon keeps no second moment of the matrices that it moves.
        squares += mine if weight.trained and not (muon and weight.roles) else 0
        bias += 0 if weight.trained else float32 * whole
        if held := rows.get(_kind(weight.path)):
            fetched, summed = held
            compute += fetched * prepared // layers
            gradients += summed * float32 * whole // layers
            reduced += float32 * mine if weight.trained else 0
        elif weight.trained:
            kept_shape = mine_shape if per_layer else whole_shape
            kept = math.prod(kept_shape)
            copied = prepared_bytes(
                kept_shape, sensitive=weight.sensitive, linear=weight.linear(kept_shape)
            )
            compute += copied if (kept, copied) != (mine, float32 * mine) else 0
            gradients += float32 * kept
            reduced += float32 * mine if kept != mine else 0
            if per_layer and whole != mine:
                gathered[weight.path.split(".")[0]] += prepared // layers
        elif rows:  # the executor's gradient sums include zeros for router biases
            gradients += float32 * whole
    return Memory(
        masters=float32 * stored,
        router_bias=bias,
        compute_weights=compute,
        gathered_layer=max(gathered.values(), default=0),
        gradients=gradients,
        reduced_gradients=reduced,
        moments=moment * (stored + squares),
        counters=COUNTERS + (MUON_COUNTERS if muon else 0),
        ema_host=float32 * stored if config.optimizer.ema_decay else 0,
    )


@functools.lru_cache(maxsize=4096)
def _prepared_bytes(
    name: str, shape: tuple[int, ...], *, sensitive: bool, linear: Linear | None
) -> int:
    """`Recipe.prepared_bytes` of a recipe, remembered: a search asks for the same shapes again."""
    return recipe(name).prepared_bytes(shape, sensitive=sensitive, linear=linear)


def _kind(path: str) -> str:
    """Layers that a weight belongs to, as `_stage_rows` names them; "" outside the layers."""
    top, part, *_ = path.split(".")
    if top == "dense_layers":
        return "dense" if part == "feed" else "shared"
    return "moe" if top == "moe_layers" else ""


def _stage_rows(config: Config) -> dict[str, tuple[int, int]]:
    """(layers of a weight that a pipeline rank fetches, layers that it sums gradients of), by kind.

    Every layer slot has the weights of an MoE layer, whose norms and attention a dense layer uses
    too ("shared"). Gradients of dense networks are summed only in the slots of a chunk that hold a
    dense layer on some rank.
    """
    held = stage_assignment.stage_map(config)
    given = config.layout.stage_layers
    counts = layers_per_stage(config.model.layers, held.stages, given)
    starts = itertools.accumulate(counts, initial=0)
    dense = [
        min(max(config.model.dense_layers - start, 0), count)
        for start, count in zip(starts, counts, strict=False)
    ]
    every = held.chunks * max(counts)
    summed = sum(
        max(dense[held.stage(rank, chunk)] for rank in range(held.ranks))
        for chunk in range(held.chunks)
    )
    return {"moe": (every, every), "dense": (every, summed), "shared": (0, 0)}
