"""Parameters with logical axes; their transfer to and from ZeRO shards and pipeline stages.

Every Variable records, for one layer, its logical axes and its whole (unsharded) sizes as Flax
metadata, which no other module accesses. A stack of layers has one more dimension in front.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.parallel import axes as mesh_axes
from deepseek_jax.parallel.axes import Axes
from deepseek_jax.parallel.pipeline import stage_assignment
from deepseek_jax.precision.fp8_tiles import E4M3
from deepseek_jax.precision.fp8_weights import Fp8Weight, Linear, scales_shape
from deepseek_jax.precision.recipes import Recipe

Dim = tuple[str | None, int]


class RouterBias(nnx.Variable):
    """Bias of a router: updated from expert load (auxiliary-loss-free), never by a gradient."""


def weight(
    rngs: nnx.Rngs, *dims: Dim, std: float, sensitive: bool = False, roles: str | None = None
) -> nnx.Param:
    """Float32 parameter from (logical axis, size) pairs, normal with standard deviation `std`.

    Args:
      sensitive: whether it stays float32 in every precision recipe.
      roles: of a linear layer's weight, the role of each dimension in its matrices: "i" input, "o"
        output, "-" none, see `fp8_weights.Linear`. None for a weight of another kind.
    """
    axes, sizes = zip(*dims, strict=True)
    value = std * jax.random.normal(rngs.params(), sizes, jnp.float32)
    return nnx.Param(value, axes=axes, sizes=sizes, sensitive=sensitive, roles=roles)


def ones(*dims: Dim) -> nnx.Param:
    """Scale of a norm: ones, sensitive."""
    axes, sizes = zip(*dims, strict=True)
    return nnx.Param(jnp.ones(sizes, jnp.float32), axes=axes, sizes=sizes, sensitive=True)


def zeros(*dims: Dim) -> nnx.Param:
    """Bias of a norm: zeros, sensitive."""
    axes, sizes = zip(*dims, strict=True)
    return nnx.Param(jnp.zeros(sizes, jnp.float32), axes=axes, sizes=sizes, sensitive=True)


def router_bias(experts: int) -> RouterBias:
    """Bias of a router: E zeros."""
    value = jnp.zeros((experts,), jnp.float32)
    return RouterBias(value, axes=(None,), sizes=(experts,), sensitive=True)


class Table(nnx.Variable):
    """Constant integers of a served model, not trained."""


def table(value: jax.Array, layers: int = 1) -> Table:
    """Table replicated on all devices; its first `layers` dimensions are stacked layers."""
    sizes = value.shape[layers:]
    return Table(value, axes=(None,) * len(sizes), sizes=sizes, sensitive=True)


def unsharded(value: jax.Array) -> nnx.Param:
    """Unsharded parameter that is derived from others, for a model on one device."""
    return nnx.Param(value, axes=(None,) * value.ndim, sizes=value.shape, sensitive=False)


def per_slot(variable: nnx.Param, expert_of_slot: jax.Array) -> nnx.Param:
    """Expert weights LE... -> weights of expert slots LR..., by the expert of each slot LR."""
    value = jax.vmap(lambda weight, expert: weight[expert])(variable[...], expert_of_slot)
    slots: Any = variable.replace(value, sizes=value.shape[1:])
    return slots


def prepare(tree: Any, recipe: Recipe) -> Any:
    """The weights as a step computes with them: `Recipe.prepare` of each master or stored weight.

    Made once per step, before `gather`. Under a layout the tree has this device's ZeRO shards.
    """

    def one(variable: Any) -> Any:
        sensitive = variable.get_metadata("sensitive")
        linear = _linear(variable)
        return variable.replace(recipe.prepare(variable[...], sensitive=sensitive, linear=linear))

    return jax.tree.map(one, tree, is_leaf=is_variable)


def _linear(variable: nnx.Variable) -> Linear | None:
    """The dimensions of a linear layer's weight, and this device's part of it."""
    roles, layout = variable.get_metadata().get("roles"), mesh_axes.current()
    if roles is None:
        return None
    axes, sizes = _meta(variable)
    if layout is None:
        return Linear.whole(roles, sizes)
    dim, zero = layout.zero_split(axes, sizes)
    used = [layout.mesh_axes(axis) for axis in axes]
    used_sizes = layout.local(layout.spec(axes), sizes)
    starts, used_starts = [], []
    over: list[str] = []
    for i, (names, size) in enumerate(zip(used, used_sizes, strict=True)):
        start = size * jax.lax.axis_index(names) if names else 0
        used_starts.append(start)
        if zero and i == dim:
            part = size // mesh_axes.devices(zero)
            start = start + part * jax.lax.axis_index(zero)
            names = (*names, *zero)
        starts.append(start)
        over += names if roles[i] != "-" else ()
    return Linear(roles, sizes, tuple(starts), tuple(used_starts), used_sizes, tuple(over))


def by_roles(tree: Any, value_of: Callable[[str | None, Any], Any], *, inside: bool = False) -> Any:
    """value_of(roles, array) of each parameter; roles are None where it is no linear layer's.

    Args:
      tree: parameters, or a tree of their structure in which some are masked.
      inside: whether values take the place of arrays; else that of parameters, as a prefix.
    """

    def one(variable: Any) -> Any:
        if not is_variable(variable):
            return value_of(None, variable)
        value = value_of(variable.get_metadata().get("roles"), jax.tree.leaves(variable)[0])
        return jax.tree.unflatten(jax.tree.structure(variable), [value]) if inside else value

    return jax.tree.map(one, tree, is_leaf=is_variable)


def stored(tree: Any, recipe: Recipe) -> Any:
    """The weights as loading leaves them for `prepare`: sensitive ones as they are, others cast."""

    def one(variable: Any) -> Any:
        if variable.get_metadata("sensitive"):
            return variable
        linear = variable.get_metadata().get("roles") is not None
        return variable.replace(variable[...].astype(recipe.stored_dtype(linear=linear)))

    return jax.tree.map(one, tree, is_leaf=is_variable)


def filled(tree: Any, value_of: Callable[["Weight"], Any]) -> Any:
    """The tree with `value_of` the description of each parameter as its value."""
    variables, structure = jax.tree.flatten(tree, is_leaf=is_variable)
    values = zip(variables, map(value_of, describe(tree)), strict=True)
    return jax.tree.unflatten(structure, [variable.replace(value) for variable, value in values])


def storage(tree: Any, layout: mesh_axes.Layout) -> Any:
    """Placement of masters or stored weights between steps.

    Scales of weights that are stored in FP8 are whole on every rank of ZeRO.
    """

    def one(weight: Weight) -> Any:
        spec: Any = layout.storage(weight.axes, weight.shape)
        if weight.dtype != E4M3:
            return spec
        scales: Any = layout.spec(weight.scales.axes)
        return Fp8Weight(spec, scales)

    return filled(tree, one)


def stack(count: int, make: Callable[[nnx.Rngs], Any], rngs: nnx.Rngs) -> Any:
    """Stack of `count` modules: one module whose leaves have a layer axis in front."""
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), count))


def is_variable(x: Any) -> bool:
    """Whether x is a parameter, for use as `is_leaf`."""
    return isinstance(x, nnx.Variable)


@dataclasses.dataclass(frozen=True)
class Weight:
    """Description of one parameter.

    Attributes:
      path: attribute names from the model down, joined by dots.
      axes: logical axes, "layer" in front for a stack.
      shape: whole (unsharded) sizes, with the stack's.
      dtype: dtype of the stored values.
      trained: whether gradients update it; not so for a router bias, or scales of FP8 blocks.
      sensitive: whether it stays float32 in every recipe.
      roles: of a linear layer's weight, see `weight`; None for others.
    """

    path: str
    axes: Axes
    shape: tuple[int, ...]
    dtype: Any
    trained: bool
    sensitive: bool
    roles: str | None

    @property
    def axes_of_scales(self) -> Axes:
        """Logical axes of an FP8 weight's scales; None for joined dimensions."""
        roles = self.roles or ""
        out = list(self.axes[: len(self.axes) - len(roles)])
        axes = self.axes[len(out) :]
        for role, group in itertools.groupby(range(len(roles)), roles.__getitem__):
            out += [axes[dim] for dim in group] if role == "-" else [None]
        return tuple(out)

    @property
    def scales(self) -> "Weight":
        """Description of the scales that a linear layer's weight has if it is stored in FP8."""
        assert self.roles is not None
        layers = len(self.shape) - len(self.roles)
        shape = (*self.shape[:layers], *scales_shape(self.roles, self.shape[layers:]))
        return Weight(
            self.path,
            self.axes_of_scales,
            shape,
            np.dtype(np.float32),
            trained=False,
            sensitive=True,
            roles=None,
        )

    def stored_dtype(self, recipe: Recipe) -> np.dtype:
        """Dtype of a master after `stored`."""
        linear = self.roles is not None
        return np.dtype(self.dtype if self.sensitive else recipe.stored_dtype(linear=linear))

    def linear(self, shape: tuple[int, ...]) -> Linear | None:
        """A linear layer's weight of this shape, a stack of layers in front, on one device."""
        if self.roles is None:
            return None
        return Linear.whole(self.roles, shape[len(shape) - len(self.roles) :])


def describe(tree: Any) -> Iterator[Weight]:
    """Descriptions of all parameters of a module or state, abstract or real, in pytree order."""
    for path, variable in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable):
        name = ".".join(str(getattr(key, "name", getattr(key, "key", key))) for key in path)
        axes, sizes = _meta(variable)
        layers = variable.shape[: len(variable.shape) - len(sizes)]
        yield Weight(
            name,
            ("layer",) * len(layers) + axes,
            (*layers, *sizes),
            variable.dtype,
            trained=isinstance(variable, nnx.Param),
            sensitive=variable.get_metadata("sensitive"),
            roles=variable.get_metadata().get("roles"),
        )


def place(tree: Any, where: Callable[[Axes, tuple[int, ...]], Any]) -> Any:
    """Tree with `where(logical axes, whole shape)` for each array of the parameters.

    A stack has "layer" in front. Dimensions that the scales of an FP8 weight join have no axis.
    """
    structure, placed = jax.tree.structure(tree), []
    variables = jax.tree.leaves(tree, is_leaf=is_variable)
    for weight, variable in zip(describe(tree), variables, strict=True):
        placed.append(where(weight.axes, weight.shape))
        value = variable.get_value()
        if isinstance(value, Fp8Weight):
            placed.append(where(weight.axes_of_scales, value.scales.shape))
    return jax.tree.unflatten(structure, placed)


def whole(module: Any) -> Any:
    """Whole weights of a layer: all-gathered from ZeRO-3 shards; unchanged in other layouts."""
    layout = mesh_axes.current()
    if layout is None or layout.zero < 3:
        return module
    return gather(module, layout)


def gather(tree: Any, layout: mesh_axes.Layout) -> Any:
    """All-gathers every weight from its ZeRO shards, inside `shard_map`."""

    def one(variable: Any) -> Any:
        if isinstance(variable, RouterBias):
            return variable
        where, value = (*_stacked(variable), layout), variable[...]
        if not isinstance(value, Fp8Weight):
            return variable.replace(mesh_axes.gather(value, *where))
        carrier = value.carrier
        if carrier is not None:
            carrier = mesh_axes.gather_gradient(carrier, *where)
        # Scales are whole already, on every rank of ZeRO.
        gathered = mesh_axes.gather(value.values, *where)
        return variable.replace(Fp8Weight(gathered, value.scales, carrier))

    return jax.tree.map(one, tree, is_leaf=is_variable)


def reduce_gradients(grads: Any, layout: mesh_axes.Layout, scattered: bool) -> Any:
    """Sums each gradient over the ranks that hold its weight, into the placement of `storage`.

    Args:
      scattered: whether the weights were gathered inside the differentiated function (ZeRO-3): its
        transpose has already reduce-scattered the gradients of ZeRO-sharded weights.
    """

    def one(variable: Any) -> Any:
        axes, shape = _stacked(variable)
        summed = layout.summed(axes)
        dim, over = layout.zero_split(axes, shape)
        value = variable[...]
        if over and not scattered:
            value = jax.lax.psum_scatter(value, over, scatter_dimension=dim, tiled=True)
        if rest := tuple(name for name in summed if name not in over):
            value = jax.lax.psum(value, rest)
        return variable.replace(value)

    return jax.tree.map(one, grads, is_leaf=is_variable)


def to_stages(stacks: Sequence[Any], rows: np.ndarray, layout: mesh_axes.Layout) -> Any:
    """Layers of this pipeline rank's stages, from masters stacked by layer.

    Args:
      stacks: trees of one structure, whose layers are numbered through.
      rows: [ranks, R] numbers of layers, see `parallel/pipeline/stage_assignment.py`.
    """

    def one(*variables: Any) -> Any:
        dim, over = _zero_split(variables[0], layout)
        fetch = functools.partial(stage_assignment.fetch, rows=rows)
        values = [variable[...] for variable in variables]
        if isinstance(values[0], Fp8Weight):  # every rank has the scales of all layers
            quantised = jnp.concatenate([value.values for value in values])
            scales = jnp.concatenate([value.scales for value in values])
            fetched: Any = Fp8Weight(
                fetch(quantised, dim=dim, over=over), fetch(scales, dim=0, over=())
            )
        else:
            fetched = fetch(jnp.concatenate(values), dim=dim, over=over)
        return variables[0].replace(fetched)

    return jax.tree.map(one, *stacks, is_leaf=is_variable)


def from_stages(
    grads: Any, rows: np.ndarray, layers: Sequence[int], layout: mesh_axes.Layout
) -> list[Any]:
    """Transpose of `to_stages`: gradients of a rank's layers -> gradients of the stacks.

    Args:
      layers: number of layers of each stack.
    """

    def one(variable: Any) -> Any:
        dim, over = _zero_split(variable, layout)
        summed = layout.summed(_stacked(variable)[0])
        returned = stage_assignment.return_gradients(
            variable[...], rows, sum(layers), dim, over, summed
        )
        return variable.replace(returned)

    returned = jax.tree.map(one, grads, is_leaf=is_variable)
    ends = np.cumsum(layers)
    return [
        jax.tree.map(lambda x, a=end - count, b=end: x[a:b], returned)
        for end, count in zip(ends, layers, strict=True)
    ]


def _zero_split(variable: nnx.Variable, layout: mesh_axes.Layout) -> tuple[int, tuple[str, ...]]:
    if isinstance(variable, RouterBias):
        return 0, ()  # small: replicated
    return layout.zero_split(*_stacked(variable))


def _meta(variable: nnx.Variable) -> tuple[Axes, tuple[int, ...]]:
    """Logical axes and whole sizes of one layer's parameter."""
    return variable.get_metadata("axes"), variable.get_metadata("sizes")


def _stacked(variable: nnx.Variable) -> tuple[Axes, tuple[int, ...]]:
    """Logical axes and whole sizes, with those of the stack in front."""
    axes, sizes = _meta(variable)
    layers = variable.shape[: len(variable.shape) - len(sizes)]
    return ("layer",) * len(layers) + axes, (*layers, *sizes)


def split(model: Any) -> tuple[Any, nnx.State, nnx.State]:
    """Structure, trained parameters and router biases of a model or a part of one."""
    parts: Any = nnx.split(model, nnx.Param, RouterBias)
    return parts
