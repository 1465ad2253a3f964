"""A small config, and a part of the model run on one or on the first few of eight devices."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import v3_671b
from deepseek_jax import config as configs
from deepseek_jax.config import MESH_AXES, Config
from deepseek_jax.model import params
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.precision import fp8_tiles

RULES = v3_671b.get_config().layout.rules.to_dict()
# The vocabulary and dense layers over devices that see the same tokens, and no others.
NARROW = {**RULES, "vocab": ("tensor",), "dense_width": ("tensor",)}


def config(**changes: Any) -> Config:
    """One dense and one MoE layer, one MTP depth; `changes` as section_key=value.

    The wide init keeps the router's scores apart, so that rounding does not change a choice. The
    buffer has room for all that is ever sent: what is made for further rounds compiles slowly.
    """
    c = v3_671b.get_config()
    c.model.update(
        vocab=64, layers=2, dense_layers=1, d_model=32, d_dense=64, heads=4, q_latent=16,
        kv_latent=16, d_nope=8, d_rope=4, d_value=8, experts=8, top_k=2, groups=4, top_groups=2,
        d_expert=16, init_std=0.1,
    )  # fmt: skip
    c.mesh.update(pipe=1, replica=1, node=1, gpu=1, tensor=1)
    c.layout.update(
        recompute="none", attention_block=16, loss_chunk=24, zero=0, capacity_factor=100.0
    )
    c.precision.update(recipe="float32", dispatch="compute")
    c.optimizer.update(moments="float32", ema_decay=0.0)
    c.batch.update(length=16, sequences=16, ramp_sequences=8, micro_sequences=8)
    for key, value in changes.items():
        section, name = key.split("_", 1)
        c[section][name] = value
    return configs.parse(c)


def indexer(top_k: int, **schedule: Any) -> dict[str, Any]:
    """Changes of `config` for a model with V3.2's indexer; equal index scores are unlikely."""
    sizes = {"model_index_heads": 12, "model_index_width": 8, "model_index_top_k": top_k}
    return sizes | {f"schedule_{name}": value for name, value in schedule.items()}


def mesh_of(sizes: Mapping[str, int]) -> Mesh:
    """A mesh over the first devices; axes that are not named have one."""
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def layout_of(sizes: Mapping[str, int], zero: int = 0, rules: Any = RULES) -> Layout:
    return Layout(rules, {name: sizes.get(name, 1) for name in MESH_AXES}, zero)


def pulled(fn: Callable[[Any, jax.Array], jax.Array], module: Any, x: jax.Array, pull: jax.Array):
    """(fn(module, x), gradients of sum(pull * fn) in the module's parameters and in x)."""
    graph, weights, bias = params.split(module)

    def total(weights, x):
        out = fn(nnx.merge(graph, weights, bias), x)
        return jnp.sum(pull * out), out

    (_, out), (d_weights, d_x) = jax.value_and_grad(total, (0, 1), has_aux=True)(weights, x)
    return out, d_weights, d_x


def spread(
    fn: Callable[[Any, jax.Array], jax.Array],
    module: Any,
    x: jax.Array,
    pull: jax.Array,
    sizes: Mapping[str, int],
):
    """`pulled` over a mesh of these sizes: x and pull split along their first axis as a batch."""
    layout = layout_of(sizes)
    graph, weights, bias = params.split(module)
    batch = P(layout.mesh_axes("batch") or None)

    def local(weights, bias, x, pull):
        with axes.active(layout):
            out, grads, d_x = pulled(fn, nnx.merge(graph, weights, bias), x, pull)
            return out, params.reduce_gradients(grads, layout, scattered=False), d_x

    placed = params.place(weights, lambda axes, _: layout.spec(axes))
    mesh = mesh_of(sizes)
    whole = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(placed, jax.tree.map(lambda _: P(), bias), batch, batch),
        out_specs=(batch, placed, batch),
        check_vma=False,
    )
    arguments = (weights, bias, x, pull)
    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        (placed, jax.tree.map(lambda _: P(), bias), batch, batch),
    )
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(whole)(*jax.device_put(arguments, places)))


def whole_fp8(variable: Any, layout: Layout) -> jax.Array:
    """An FP8 weight, multiplied with its scales and gathered from all devices."""
    weight, roles = variable[...], variable.get_metadata("roles")
    layers = weight.shape[: weight.ndim - len(roles)]
    shape = list(layers)
    for role, dims in itertools.groupby(
        zip(roles, weight.shape[len(layers) :], strict=True), lambda d: d[0]
    ):
        sizes = [size for _, size in dims]
        shape += sizes if role == "-" else [math.prod(sizes)]
    values = weight.values.astype(np.float32).reshape(shape)
    out = (values * fp8_tiles.spread(weight.scales, values.shape)).reshape(weight.shape)
    for dim, axis in enumerate(variable.get_metadata("axes"), len(layers)):
        if names := layout.mesh_axes(axis):
            out = jax.lax.all_gather(out, names, axis=dim, tiled=True)
    return out


def assert_close(got: Any, want: Any, rtol: float = 1e-5) -> None:
    """Every leaf to rtol of its own norm, which is what float32 sums in another order allow."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        other = _at(got, path)
        difference = np.linalg.norm(np.asarray(other, np.float64) - np.asarray(leaf, np.float64))
        size = np.linalg.norm(np.asarray(leaf, np.float64))
        name = jax.tree_util.keystr(path)
        assert difference <= rtol * size + 1e-12, f"{name}: {difference:.2e} of {size:.2e}"


def _at(tree: Any, path: Any) -> Any:
    return dict(jax.tree_util.tree_leaves_with_path(tree))[path]
