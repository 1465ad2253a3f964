"""Bytes per device of all that a training run keeps, from the abstract model: no devices needed.

The places are those that training uses, `Layout.spec` and `Layout.storage`, so that what is
predicted here is what gets allocated.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import Config, ConfigError
from deepseek_jax.model import params
from deepseek_jax.model.params import Weight
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.parallel import mesh
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.precision.matmul import recipe

COUNTERS = 2 * 4  # the step and Adam's count, int32


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, unless said otherwise. Temporaries and activations are not in it.

    Attributes:
      masters: float32 parameters, in the storage layout.
      router_bias: float32, whole on every device.
      compute_weights: what matmuls read beside the masters: a copy in the recipe's dtype (sensitive
        weights stay float32), whole for the step with layout.zero 0 and 1, split like the masters
        with 3. A weight whose dtype and layout are its master's needs no copy.
      gathered_layer: with layout.zero=3, the largest of one layer, table or MTP module, gathered.
      gradients: float32 sums over micro-batches, in the layout of `compute_weights`.
      reduced_gradients: float32, in the storage layout: what the optimiser receives, for weights
        whose gradients are scattered; the others are summed where they are.
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
    """Of the fullest pipeline rank; `config.mesh` must have no -1.

    Raises:
      ConfigError: a number of stages that DualPipe cannot pair, or more of them than layers.
    """
    layout, pipe = mesh.layout(config), config.mesh.pipe
    dtype = recipe(config.precision.recipe).compute
    cast = jax.eval_shape(lambda m: params.cast(m, dtype), abstract_model(config.model))
    weights = list(params.describe(cast))
    if pipe == 1:
        return _sum(config, layout, weights)
    if pipe % 2 or pipe > config.model.layers:
        raise ConfigError(
            f"mesh.pipe={pipe}: DualPipe pairs stages r and {pipe - 1} - r of "
            f"model.layers={config.model.layers} layers; set mesh.pipe to 1 or an even "
            "number of at most model.layers"
        )
    # A stage holds its own layers, so the stacked axis is not split again.
    rules = {axis: over for axis, over in layout.rules.items() if axis != "layer"}
    layout = dataclasses.replace(layout, rules=rules)
    held = stages(config.model.layers, pipe)
    parts = [list(_part(config, weights, held, stage)) for stage in range(pipe)]
    ranks = [_sum(config, layout, parts[r] + parts[pipe - 1 - r]) for r in range(pipe)]
    return max(ranks, key=lambda rank: rank.total)


def stages(layers: int, parts: int) -> list[range]:
    """Layers of each pipeline stage, in order, as even as possible."""
    ends = [math.ceil(layers * i / parts) for i in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(ends)]


def _part(
    config: Config, weights: Iterable[Weight], held: list[range], stage: int
) -> Iterator[Weight]:
    """What one stage holds: its layers; the table in the first; norm, head and MTP in the last.

    DualPipe puts first and last stage on one rank, which is how MTP shares the table.
    """
    dense = sum(layer < config.model.dense_layers for layer in held[stage])
    counts = {"dense_layers": dense, "moe_layers": len(held[stage]) - dense}
    for weight in weights:
        top = weight.path.split(".")[0]
        if top in counts:
            if counts[top]:
                yield dataclasses.replace(weight, shape=(counts[top], *weight.shape[1:]))
        elif stage == (0 if top == "embedding" else len(held) - 1):
            yield weight


def local_size(shape: tuple[int, ...], spec: P, layout: Layout) -> int:
    """Numbers on one device of an array of `shape` that lives as `spec`."""
    names = [name for part in spec if part for name in ((part,) if isinstance(part, str) else part)]
    return math.prod(shape) // math.prod(layout.sizes[name] for name in names)


def _sum(config: Config, layout: Layout, weights: Iterable[Weight]) -> Memory:
    per_layer, float32 = layout.zero == 3, 4
    moment = jnp.dtype(config.optimizer.moments).itemsize
    stored = bias = compute = gradients = reduced = 0
    gathered: dict[str, int] = collections.defaultdict(int)
    for weight in weights:
        if not weight.trained:
            bias += float32 * math.prod(weight.shape)
            continue
        mine = local_size(weight.shape, layout.storage(weight.axes, weight.shape), layout)
        whole = local_size(weight.shape, layout.spec(weight.axes), layout)
        kept, each = mine if per_layer else whole, weight.dtype.itemsize
        stored += mine
        compute += kept * each if (kept, each) != (mine, float32) else 0
        gradients += float32 * kept
        reduced += float32 * mine if kept != mine else 0
        if per_layer and whole != mine:
            layers = weight.shape[0] if "layer" in weight.axes else 1
            gathered[weight.path.split(".")[0]] += whole * each // layers
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
