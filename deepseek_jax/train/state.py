"""State of a training run on the devices, and the placement of each of its parts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonState

from deepseek_jax.config import Config
from deepseek_jax.hardware import xla_options
from deepseek_jax.model import params as weights
from deepseek_jax.model.transformer import abstract_model, build_model
from deepseek_jax.parallel.axes import Axes, Layout

# State of an optimizer with moments -> its name in checkpoints, its moments, and its other arrays.
_MOMENTS: dict[type, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    optax.ScaleByAdamState: ("adam", ("mu", "nu"), ("count",)),
    MuonState: ("muon", ("mu",), ("count", "ns_coeffs")),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State between two steps.

    Attributes:
      step: () int32, optimiser steps taken.
      params: float32 master weights, moved by gradients.
      bias: router biases, float32, moved by load alone.
      opt_state: of clipping, Adam (both moments) and decay.
      ema: float32 average of `params` in host memory; None if it is switched off.
    """

    step: jax.Array
    params: nnx.State
    bias: nnx.State
    opt_state: optax.OptState
    ema: nnx.State | None


def host_memory() -> str:
    """Memory kind of host memory on this backend, where the EMA is kept."""
    kinds = [memory.kind for memory in jax.local_devices()[0].addressable_memories()]
    return "pinned_host" if "pinned_host" in kinds else kinds[0]


def shardings(
    config: Config, layout: Layout, mesh: Mesh, optimizer: optax.GradientTransformation
) -> Any:
    """Placement of a state: a TrainState of NamedShardings."""

    def stored(kind: str | None = None) -> Callable[[Axes, tuple[int, ...]], NamedSharding]:
        def where(axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
            return NamedSharding(mesh, layout.storage(axes, shape), memory_kind=kind)

        return where

    _, params, bias = weights.split(abstract_model(config.model))
    whole = NamedSharding(mesh, P())
    masters = weights.place(params, stored())
    moments = optax.tree.map_params(
        optimizer,
        lambda leaf, place: leaf if isinstance(leaf, optax.MaskedNode) else place,
        jax.eval_shape(optimizer.init, params),
        masters,
        transform_non_params=lambda _: whole,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    ema = weights.place(params, stored(host_memory())) if config.optimizer.ema_decay else None
    return TrainState(
        step=whole,  # type: ignore[arg-type]
        params=masters,
        bias=jax.tree.map(lambda _: whole, bias),
        opt_state=moments,
        ema=ema,
    )


def _around(
    config: Config, optimizer: optax.GradientTransformation, params: nnx.State, bias: nnx.State
) -> TrainState:
    """State at step 0 of training these weights."""
    ema = params if config.optimizer.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, bias, optimizer.init(params), ema)


def _fresh(config: Config, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    _, params, bias = weights.split(build_model(config.model, key))
    return _around(config, optimizer, params, bias)


def initialise(config: Config, places: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state, each part built in its place; the numbers are the same on every layout."""
    quick = dict(xla_options.ONCE_ON_CPU) if jax.default_backend() == "cpu" else None
    build = jax.jit(
        lambda key: _fresh(config, optimizer, key), out_shardings=places, compiler_options=quick
    )
    return build(jax.random.key(config.seed))


def abstract(
    config: Config, places: TrainState, optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes, dtypes and placement of a state, into which a checkpoint is restored."""
    _, params, bias = weights.split(abstract_model(config.model))
    shapes = jax.eval_shape(
        lambda params, bias: _around(config, optimizer, params, bias), params, bias
    )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )


def weights_only(state: TrainState) -> dict[str, Any]:
    """Weights and biases alone, named as in `to_dict`: a converted checkpoint holds no more."""
    return {"params": _named(state.params), "bias": _named(state.bias)}


def begin(
    config: Config,
    like: TrainState,
    optimizer: optax.GradientTransformation,
    values: dict[str, Any],
) -> TrainState:
    """State at step 0 from the arrays of `weights_only`, placed as the abstract state `like`."""
    build = jax.jit(
        lambda params, bias: _around(config, optimizer, params, bias),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like),
        donate_argnums=(0, 1),
    )
    return build(_renamed(like.params, values["params"]), _renamed(like.bias, values["bias"]))


def begin_average(like: TrainState, values: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint without an average, with one that begins at its weights."""
    where = _named(jax.tree.map(lambda leaf: leaf.sharding, like.ema))
    copy = jax.jit(lambda weights: jax.tree.map(jnp.copy, weights), out_shardings=where)
    return {**values, "ema": copy(values["params"])}


def copy_to_host(state: TrainState) -> TrainState:
    """A copy in host memory, for a checkpoint, of a state that the next step donates.

    Returns at once: the devices copy before the step overwrites what it was given. The EMA is in
    host memory and is not donated, so it is no copy.
    """
    moving, kind = dataclasses.replace(state, ema=None), host_memory()
    places = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(kind), moving)
    copy: TrainState = jax.device_put(moving, places, may_alias=False)
    return dataclasses.replace(copy, ema=state.ema)


def to_dict(state: TrainState) -> dict[str, Any]:
    """Content of a checkpoint: the state as nested dictionaries of arrays under plain names."""
    out = {"step": state.step, "params": _named(state.params), "bias": _named(state.bias)}
    for part in jax.tree.leaves(state.opt_state, is_leaf=_has_moments):
        if _has_moments(part):
            name, moments, numbers = _MOMENTS[type(part)]
            kept = {moment: _named(getattr(part, moment)) for moment in moments}
            out[name] = {number: getattr(part, number) for number in numbers} | kept
    return out if state.ema is None else out | {"ema": _named(state.ema)}


def from_dict(like: TrainState, values: dict[str, Any]) -> TrainState:
    """Inverse of `to_dict`, with the structure of `like`."""

    def filled(part: Any) -> Any:
        if not _has_moments(part):
            return part
        name, moments, numbers = _MOMENTS[type(part)]
        kept = {m: _renamed(getattr(part, m), values[name][m]) for m in moments}
        return part._replace(**{number: values[name][number] for number in numbers}, **kept)

    return TrainState(
        step=values["step"],
        params=_renamed(like.params, values["params"]),
        bias=_renamed(like.bias, values["bias"]),
        opt_state=jax.tree.map(filled, like.opt_state, is_leaf=_has_moments),
        ema=None if like.ema is None else _renamed(like.ema, values["ema"]),
    )


def _has_moments(part: Any) -> bool:
    return type(part) in _MOMENTS


def _named(tree: Any) -> dict[str, Any]:
    """Arrays by path: names of attributes and dictionary keys from the top down, with dots."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _renamed(like: Any, values: dict[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: values[_name(path)], like)


def _name(path: Any) -> str:
    parts = [str(getattr(key, "name", getattr(key, "key", key))) for key in path]
    return ".".join(part for part in parts if part != "value")
