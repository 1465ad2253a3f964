"""Rules from logical axes to mesh axes, ZeRO sharding, and collectives over logical axes.

The model is written for one device. Under a `Layout` the same code runs inside one `shard_map` that
is manual over every mesh axis: arrays are then a device's shards, and a contraction over a sharded
axis needs the two operators that Megatron-LM calls f and g, here `fan_out` and `fan_in`. Without an
active layout every axis has size one and both are the identity.

An axis may also be sharded over data-parallel mesh axes, whose devices hold different tokens. Each
device then applies its shard of the weights to the tokens of all: `fan_out` all-gathers them, and
`fan_in` reduce-scatters the results.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import DATA_AXES, LOGICAL_AXES

Axes = tuple[str | None, ...]
PIPE = "pipe"  # the mesh axis of pipeline ranks


@dataclasses.dataclass(frozen=True)
class Layout:
    """Placement of the model on a mesh.

    Attributes:
      rules: logical axis -> mesh axes that shard it, outermost first.
      sizes: mesh axis -> number of devices along it.
      zero: 0: weights, float32 masters and moments are replicated over data-parallel ranks. 1
        (ZeRO-1): masters and moments are sharded over them. 3 (ZeRO-3): the compute weights too,
        all-gathered layer by layer.
    """

    rules: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]
    zero: int

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """Mesh axes of more than one device that shard this logical axis."""
        if axis is None:
            return ()
        if axis not in LOGICAL_AXES:
            raise ValueError(f"unknown logical axis {axis!r}; known: {', '.join(LOGICAL_AXES)}")
        return tuple(name for name in self.rules.get(axis, ()) if self.sizes[name] > 1)

    def spec(self, axes: Axes) -> P:
        """Placement of a compute array with these logical axes."""
        return P(*(self.mesh_axes(axis) or None for axis in axes))

    def summed(self, axes: Axes) -> tuple[str, ...]:
        """Mesh axes over which the weight is replicated, so that its gradient is summed.

        `pipe` is one of them: ZeRO shards the float32 masters over it too, innermost, so that the
        shards of each stage are contiguous.
        """
        used = {name for axis in axes for name in self.mesh_axes(axis)}
        over = (*DATA_AXES, PIPE)
        return tuple(a for a in over if self.sizes[a] > 1 and a not in used)

    def zero_split(self, axes: Axes, shape: tuple[int, ...]) -> tuple[int, tuple[str, ...]]:
        """ZeRO-1 and ZeRO-3 sharding: (dimension, mesh axes); (0, ()) where no dimension fits.

        The longest divisible dimension is taken. The stacked layer axis is never sharded, so that
        layers can be gathered one at a time.
        """
        names = self.summed(axes) if self.zero else ()
        while names:
            parts = math.prod(self.sizes[name] for name in names)
            fits = [
                (size, -dim)
                for dim, (axis, size) in enumerate(zip(axes, shape, strict=True))
                if axis != "layer" and not self.mesh_axes(axis) and size % parts == 0
            ]
            if fits:
                return -max(fits)[1], names
            names = names[1:]
        return 0, ()

    def storage(self, axes: Axes, shape: tuple[int, ...]) -> P:
        """Placement of masters, moments and reduced gradients: `spec` plus the ZeRO sharding."""
        dim, names = self.zero_split(axes, shape)
        parts = [self.mesh_axes(axis) or None for axis in axes]
        if names:
            parts[dim] = names
        return P(*parts)

    def local(self, spec: P, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape on one device of an array of `shape` that is placed by `spec`."""
        parts = (*spec, *(None,) * (len(shape) - len(spec)))
        names = [(part,) if isinstance(part, str) else part or () for part in parts]
        return tuple(
            size // math.prod(self.sizes[name] for name in over)
            for size, over in zip(shape, names, strict=True)
        )


_active: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def active(layout: Layout | None) -> Iterator[None]:
    """Context in which traced model code is one device's part of `layout`."""
    token = _active.set(layout)
    try:
        yield
    finally:
        _active.reset(token)


def current() -> Layout | None:
    """Active layout, or None."""
    return _active.get()


def names(axis: str) -> tuple[str, ...]:
    """Mesh axes that shard the logical axis `axis`; empty outside a layout."""
    layout = _active.get()
    return layout.mesh_axes(axis) if layout else ()


def devices(mesh_axes: tuple[str, ...]) -> int:
    """Number of devices along these mesh axes."""
    layout = _active.get()
    return math.prod(layout.sizes[name] for name in mesh_axes) if layout else 1


def size(axis: str) -> int:
    """Number of shards of the logical axis `axis`."""
    return devices(names(axis))


def index(axis: str) -> jax.Array | int:
    """Index of this device's shard of `axis`."""
    return lax.axis_index(names(axis)) if names(axis) else 0


def fan_out(x: jax.Array, axis: str) -> jax.Array:
    """Megatron-LM's f: identity forward, sum of the gradients over the shards of `axis` backward.

    Over data-parallel mesh axes: all-gather along the first dimension, reduce-scatter backward.
    """
    return _fan_out(x, names(axis)) if names(axis) else x


def fan_in(x: jax.Array, axis: str) -> jax.Array:
    """Megatron-LM's g: sum over the shards of `axis` forward, identity backward.

    Over data-parallel mesh axes: reduce-scatter along the first dimension, all-gather backward.
    """
    return _fan_in(x, names(axis)) if names(axis) else x


def own(x: jax.Array, axis: str) -> jax.Array:
    """Rows of this device, of an array whose rows `fan_out` gathered from all devices."""
    over = _data_axes(names(axis))
    if not over:
        return x
    count = x.shape[0] // devices(over)
    return lax.dynamic_slice_in_dim(x, count * lax.axis_index(over), count)


def _data_axes(over: tuple[str, ...]) -> tuple[str, ...]:
    """Mesh axes among `over` along which devices hold different tokens."""
    return tuple(name for name in over if name in DATA_AXES)


def _gathered(x: jax.Array, over: tuple[str, ...]) -> jax.Array:
    return lax.all_gather(x, _data_axes(over), tiled=True) if _data_axes(over) else x


def _summed(x: jax.Array, over: tuple[str, ...]) -> jax.Array:
    data = _data_axes(over)
    x = lax.psum_scatter(x, data, tiled=True) if data else x
    rest = tuple(name for name in over if name not in data)
    return lax.psum(x, rest) if rest else x


def join(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """All-gather of the shards of `axis` along dimension `dim`; not for differentiation."""
    return lax.all_gather(x, names(axis), axis=dim, tiled=True) if names(axis) else x


def anywhere(flag: jax.Array, axis: str) -> jax.Array:
    """Whether a () bool holds on any shard of `axis`; equal on all of them."""
    return lax.pmax(flag.astype(jnp.int32), names(axis)) > 0 if names(axis) else flag


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fan_out(x: jax.Array, over: tuple[str, ...]) -> jax.Array:
    return _gathered(x, over)


_fan_out.defvjp(
    lambda x, over: (_gathered(x, over), None), lambda over, _, dy: (_summed(dy, over),)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fan_in(x: jax.Array, over: tuple[str, ...]) -> jax.Array:
    return _summed(x, over)


_fan_in.defvjp(lambda x, over: (_summed(x, over), None), lambda over, _, dy: (_gathered(dy, over),))


def gather(weight: Any, axes: Axes, shape: tuple[int, ...], layout: Layout) -> Any:
    """All-gather of a weight from its ZeRO shards; its gradient is reduce-scattered to them.

    The sum over ranks is taken in float32 and rounded once to the weight's dtype.
    """
    dim, over = layout.zero_split(axes, shape)
    return _gather(weight, dim, over) if over else weight


def gather_gradient(shard: Any, axes: Axes, shape: tuple[int, ...], layout: Layout) -> Any:
    """Zeros in the shape of the whole weight, with the gradient of `gather`: no message forward."""
    dim, over = layout.zero_split(axes, shape)
    return _zeros(shard, dim, over) if over else shard


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _zeros(shard: jax.Array, dim: int, over: tuple[str, ...]) -> jax.Array:
    shape = list(shard.shape)
    shape[dim] *= devices(over)
    return jnp.zeros(shape, shard.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: jax.Array, dim: int, over: tuple[str, ...]) -> jax.Array:
    return lax.all_gather(weight, over, axis=dim, tiled=True)


def _scatter(dim: int, over: tuple[str, ...], _: None, d_weight: jax.Array) -> tuple[jax.Array]:
    wide = d_weight.astype(jnp.float32)
    part = lax.psum_scatter(wide, over, scatter_dimension=dim, tiled=True)
    return (part.astype(d_weight.dtype),)


_gather.defvjp(lambda weight, dim, over: (_gather(weight, dim, over), None), _scatter)
_zeros.defvjp(lambda shard, dim, over: (_zeros(shard, dim, over), None), _scatter)
