"""Logical axes -> mesh axes, and the few collectives that model code may ask for by logical name.

The model is written for one device. Under a `Layout` the same code runs inside one `shard_map` that
is manual over every mesh axis: arrays are then a device's own part, and a contraction over a split
axis needs the two functions that Megatron-LM calls f and g, here `fan_out` and `fan_in`. With no
layout active every axis has size one and they do nothing.

An axis may also be split over devices that see different tokens: then each works for all of them on
its part of the weights, and what fans out is gathered, what fans in is scattered.
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


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to lay the model over a mesh.

    Attributes:
      rules: logical axis -> mesh axes it is split over, outermost first.
      sizes: mesh axis -> number of devices along it.
      zero: 0 every rank keeps whole weights; 1 float32 masters and moments are split over the ranks
        that see different data; 3 the weights that compute uses are split too, gathered per layer.
    """

    rules: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]
    zero: int

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes, of more than one device, that this logical axis is split over."""
        if axis is None:
            return ()
        if axis not in LOGICAL_AXES:
            raise ValueError(f"unknown logical axis {axis!r}; known: {', '.join(LOGICAL_AXES)}")
        return tuple(name for name in self.rules.get(axis, ()) if self.sizes[name] > 1)

    def spec(self, axes: Axes) -> P:
        """Where compute wants an array with these logical axes."""
        return P(*(self.mesh_axes(axis) or None for axis in axes))

    def summed(self, axes: Axes) -> tuple[str, ...]:
        """The axes along which every rank holds this weight, so that its gradient is a sum.

        Ranks of a pipeline hold other layers; but as masters they are all the same, and `pipe` goes
        innermost so that what one rank computes with is a run of what ZeRO splits.
        """
        used = {name for axis in axes for name in self.mesh_axes(axis)}
        over = (*DATA_AXES, "pipe")
        return tuple(a for a in over if self.sizes[a] > 1 and a not in used)

    def zero_split(self, axes: Axes, shape: tuple[int, ...]) -> tuple[int, tuple[str, ...]]:
        """Which dimension ZeRO splits, and over which mesh axes; (0, ()) where nothing fits.

        The longest dimension that divides wins; the stacked layer axis is never split, so that one
        layer can be gathered at a time.
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
        """Where masters, moments and reduced gradients live: `spec` plus the ZeRO split."""
        dim, names = self.zero_split(axes, shape)
        parts = [self.mesh_axes(axis) or None for axis in axes]
        if names:
            parts[dim] = names
        return P(*parts)


_active: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def active(layout: Layout | None) -> Iterator[None]:
    """Model code traced in this context runs as one device's part of `layout`."""
    token = _active.set(layout)
    try:
        yield
    finally:
        _active.reset(token)


def current() -> Layout | None:
    return _active.get()


def names(axis: str) -> tuple[str, ...]:
    """Mesh axes that `axis` is split over here; empty outside a layout."""
    layout = _active.get()
    return layout.mesh_axes(axis) if layout else ()


def devices(mesh_axes: tuple[str, ...]) -> int:
    """Number of devices along these mesh axes."""
    layout = _active.get()
    return math.prod(layout.sizes[name] for name in mesh_axes) if layout else 1


def size(axis: str) -> int:
    """Number of parts that `axis` is split into here."""
    return devices(names(axis))


def index(axis: str) -> jax.Array | int:
    """Which of those parts this device holds."""
    return lax.axis_index(names(axis)) if names(axis) else 0


def fan_out(x: jax.Array, axis: str) -> jax.Array:
    """`x`, equal on all parts of `axis`, enters work that differs: the gradient is summed.

    Parts that see different tokens get those of all of them, along the first dimension.
    """
    return _fan_out(x, names(axis)) if names(axis) else x


def fan_in(x: jax.Array, axis: str) -> jax.Array:
    """Sums the parts' contributions; every part gets the sum, and the gradient as it is.

    Of parts that see different tokens each gets the sum of its own.
    """
    return _fan_in(x, names(axis)) if names(axis) else x


def own(x: jax.Array, axis: str) -> jax.Array:
    """This device's part of what `fan_out` gathered, where all have the same."""
    over = _apart(names(axis))
    if not over:
        return x
    count = x.shape[0] // devices(over)
    return lax.dynamic_slice_in_dim(x, count * lax.axis_index(over), count)


def _apart(over: tuple[str, ...]) -> tuple[str, ...]:
    """Those along which devices see different tokens."""
    return tuple(name for name in over if name in DATA_AXES)


def _gathered(x: jax.Array, over: tuple[str, ...]) -> jax.Array:
    return lax.all_gather(x, _apart(over), tiled=True) if _apart(over) else x


def _summed(x: jax.Array, over: tuple[str, ...]) -> jax.Array:
    apart = _apart(over)
    x = lax.psum_scatter(x, apart, tiled=True) if apart else x
    rest = tuple(name for name in over if name not in apart)
    return lax.psum(x, rest) if rest else x


def join(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """All parts of `axis`, one after another along `dim`, on each of them; no gradient."""
    return lax.all_gather(x, names(axis), axis=dim, tiled=True) if names(axis) else x


def anywhere(flag: jax.Array, axis: str) -> jax.Array:
    """Whether a () bool holds on any part of `axis`: the same answer on all of them."""
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
    """A weight from its ZeRO parts; the gradient is reduced and scattered back the same way.

    Whatever the weight's dtype, the sum over ranks is one of float32, rounded once.
    """
    dim, over = layout.zero_split(axes, shape)
    return _gather(weight, dim, over) if over else weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: jax.Array, dim: int, over: tuple[str, ...]) -> jax.Array:
    return lax.all_gather(weight, over, axis=dim, tiled=True)


def _scatter(dim: int, over: tuple[str, ...], _: None, d_weight: jax.Array) -> tuple[jax.Array]:
    wide = d_weight.astype(jnp.float32)
    part = lax.psum_scatter(wide, over, scatter_dimension=dim, tiled=True)
    return (part.astype(d_weight.dtype),)


_gather.defvjp(lambda weight, dim, over: (_gather(weight, dim, over), None), _scatter)
