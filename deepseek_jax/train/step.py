"""Optimiser step, pure: gradients over all micro-batches, AdamW, router biases, and the EMA."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import Config
from deepseek_jax.model import execution, params, router
from deepseek_jax.model.params import split
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.parallel import axes
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.axes import DATA_AXES, Layout
from deepseek_jax.precision.recipes import Recipe
from deepseek_jax.precision.weight_gradients import carriers, with_carriers
from deepseek_jax.train import optimizer as optimizers
from deepseek_jax.train import pipeline_step, token_schedule
from deepseek_jax.train import state as states
from deepseek_jax.train.anomalies import Limits
from deepseek_jax.train.index_training import (
    in_training,
    index_weight,
    of_indexers,
    stopped_but_indexers,
)
from deepseek_jax.train.objective import Sums, objective
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.token_schedule import Hyper

jax.tree_util.register_dataclass(
    Hyper, data_fields=["learning_rate", "mtp_weight", "bias_speed"], meta_fields=[]
)

jax.tree_util.register_dataclass(Limits, data_fields=["loss", "grad_norm"], meta_fields=[])

# (state, tokens A B S+1, micro-batches that count, Hyper, Limits if the step may skip its update)
# -> (state, metrics)
Step = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def tokens_spec(layout: Layout) -> P:
    """PartitionSpec of a step's tokens, AB(S+1): micro-batch, sequence, position."""
    return P(None, layout.mesh_axes("batch") or None, None)


def make_gradients(
    config: Config, layout: Layout, mesh: Mesh, recipe: Recipe | None = None
) -> Callable[..., Any]:
    """Makes a step's gradient function: one shard_map, manual over every mesh axis.

    Returns:
      gradients(masters, biases, tokens AB(S+1), count of micro-batches, mtp_weight) -> (gradients
      float32, placed as `Layout.storage`; `Sums` over all ranks). All communication of the step is
      written out in it.
    """
    if layout.sizes["pipe"] > 1:
        return pipeline_step.make_gradients(config, layout, mesh, tokens_spec(layout))
    graph, abstract, abstract_bias = split(abstract_model(config.model))
    stored = params.place(abstract, layout.storage)
    biases = jax.tree.map(lambda _: P(), abstract_bias)
    how = in_training(config, recipe)
    warm_up = how.index_loss == "warm_up"
    per_layer = config.layout.zero == 3
    data_axes = tuple(name for name in DATA_AXES if layout.sizes[name] > 1)

    def local(
        masters: nnx.State,
        bias: nnx.State,
        tokens: jax.Array,
        count: jax.Array,
        mtp_weight: jax.Array,
    ) -> tuple[nnx.State, Sums]:
        with axes.active(layout):
            # Prepared before they are gathered: in bfloat16, half the bytes.
            compute = params.prepare(masters, how.recipe)
            compute = compute if per_layer else params.gather(compute, layout)
            sequences = (count * config.batch.micro_sequences).astype(jnp.float32)

            def loss(
                arrays: nnx.State, micro: jax.Array, how: execution.Execution
            ) -> tuple[jax.Array, Sums]:
                arrays = stopped_but_indexers(arrays) if warm_up else arrays
                model = nnx.merge(graph, with_carriers(compute, arrays), bias)
                return objective(
                    model,
                    micro,
                    how=how,
                    chunk=config.layout.loss_chunk,
                    mtp_weight=mtp_weight,
                    alpha=config.schedule.balance_alpha,
                    sequences=sequences,
                    index=index_weight(config, sequences),
                )

            # jit so that it is traced once for all its call sites.
            @functools.partial(jax.jit, static_argnums=1, inline=True)
            def gradients(micro: jax.Array, in_flight: int) -> tuple[nnx.State, Sums]:
                run = dataclasses.replace(how, in_flight=in_flight)
                grads, sums = jax.grad(loss, has_aux=True)(carriers(compute), micro, run)
                return jax.tree.map(lambda x: x.astype(jnp.float32), (grads, sums))

            grads, sums = _over_micro_batches(gradients, tokens, count, how.in_flight)
            grads = params.reduce_gradients(grads, layout, scattered=per_layer)
            sums = lax.psum(sums, data_axes) if data_axes else sums
            return grads, sums

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(stored, biases, tokens_spec(layout), P(), P()),
        out_specs=(stored, P()),
        check_vma=False,  # fan_out and fan_in place the sums that the check would otherwise infer
    )


def _over_micro_batches(gradients: Any, tokens: jax.Array, count: jax.Array, in_flight: int) -> Any:
    """Sum of gradients(B(S+1), in_flight) over the first `count` micro-batches of tokens AB(S+1).

    Micro-batches are computed `in_flight` at a time, concatenated along the batch; a remainder is
    computed one at a time.
    """
    if tokens.shape[0] == 1:
        return gradients(tokens[0], 1)

    def together(number: int) -> Any:
        def add(i: jax.Array, total: Any) -> Any:
            micro = lax.dynamic_slice_in_dim(tokens, i * number, number)
            return jax.tree.map(
                jnp.add, total, gradients(micro.reshape(-1, micro.shape[-1]), number)
            )

        return add

    shapes = jax.eval_shape(lambda tokens: gradients(tokens[0], 1), tokens)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    done = count // in_flight
    total = lax.fori_loop(0, done, together(in_flight), zeros)
    return total if in_flight == 1 else lax.fori_loop(done * in_flight, count, together(1), total)


def make_step(
    config: Config,
    layout: Layout,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    recipe: Recipe | None = None,
) -> Step:
    """Makes the pure training step; the caller jits it and donates the state.

    Args:
      recipe: in place of the config's, in a step without a pipeline; None for the config's.
    """
    gradients = make_gradients(config, layout, mesh, recipe)
    length, depth = config.batch.length, config.model.mtp_depth
    ranks = math.prod(layout.sizes[name] for name in DATA_AXES)
    warm_up = in_training(config, recipe).index_loss == "warm_up"

    def step(
        state: TrainState,
        tokens: jax.Array,
        count: jax.Array,
        hyper: Hyper,
        limits: Limits | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, sums = gradients(state.params, state.bias, tokens, count, hyper.mtp_weight)
        grads = of_indexers(grads) if warm_up else grads
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            updates = of_indexers(updates) if warm_up else updates  # nothing else decays, either
            stepped = jax.tree.map(lambda p, u: p - hyper.learning_rate * u, state.params, updates)
            bias = state.bias
            if not warm_up:
                bias = _move_biases(bias, sums.load, hyper.bias_speed, config.model.moe_layers)

        sequences = (count * config.batch.micro_sequences).astype(jnp.float32)
        losses = sums.entropy / (sequences * (length - jnp.arange(depth + 1)))
        metrics = {
            "loss": losses[0],
            "mtp_loss": losses[1:].mean() if depth else jnp.zeros(()),
            "mtp_losses": losses[1:],
            "balance_loss": sums.balance / sequences,
            "grad_norm": optax.tree.norm(grads),
            "max_violation": router.max_violation(sums.load),
            "expert_load": sums.load / sums.load.sum(-1, keepdims=True),
            "tokens_per_node": sums.traffic.nodes,
            "tokens_per_gpu": sums.traffic.gpus,
            "node_copies_per_token": sums.traffic.nodes.sum(-1) / (sequences * length),
            "gpu_copies_per_token": sums.traffic.gpus.sum(-1) / (sequences * length),
            "dispatch_rounds": sums.traffic.rounds / (count * ranks),
        }
        if sums.index is not None:
            layers = config.model.layers + depth
            metrics["index_loss"] = sums.index / (sequences * length * layers)
        after = dataclasses.replace(state, params=stepped, bias=bias, opt_state=opt_state)
        if limits is not None:
            after, metrics["skipped"] = _unless_anomaly(after, state, metrics, limits)
        return dataclasses.replace(after, step=state.step + 1), metrics

    return step


def _unless_anomaly(
    after: TrainState, before: TrainState, metrics: dict[str, jax.Array], limits: Limits
) -> tuple[TrainState, jax.Array]:
    """The state after a good step, or that before an anomaly; and whether it is an anomaly.

    Loss and norm are sums over all devices, so all devices decide the same. No NaN is below a
    limit, and no limit is infinite.
    """
    good = (metrics["loss"] <= limits.loss) & (metrics["grad_norm"] <= limits.grad_norm)
    kept = jax.tree.map(lambda new, old: lax.select(good, new, old), after, before)
    return kept, jnp.logical_not(good)


def _move_biases(biases: nnx.State, load: jax.Array, speed: Any, moe_layers: int) -> nnx.State:
    """Moves each layer's router bias by its load; rows of load: MoE layers, then MTP blocks."""

    def move(path: Any, bias: jax.Array) -> jax.Array:
        mtp = any(str(getattr(key, "key", "")) == "mtp" for key in path)
        rows = load[moe_layers:] if mtp else load[:moe_layers]
        return router.move_bias(bias, rows, speed)

    return jax.tree_util.tree_map_with_path(move, biases)


def abstract_arguments(
    config: Config, layout: Layout, mesh: Mesh, number_place: NamedSharding | None = None
) -> tuple[Any, ...]:
    """Shapes, dtypes and placement of a step's arguments besides the state.

    Limits are among them where `anomaly.rule` is "skip", else the program knows of none.

    Args:
      number_place: placement of the numbers; None where the caller gives NumPy's.
    """
    batch = config.batch
    tokens = jax.ShapeDtypeStruct(
        (token_schedule.most_micro_batches(batch), batch.micro_sequences, batch.length + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, tokens_spec(layout)),
    )

    def number(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((), dtype, sharding=number_place)

    hyper = Hyper(*(number(jnp.float32) for _ in dataclasses.fields(Hyper)))
    limits = Limits(number(jnp.float32), number(jnp.float32))
    return tokens, number(jnp.int32), hyper, *([limits] if config.anomaly.rule == "skip" else [])


def make_ema(config: Config, places: TrainState) -> Any:
    """Makes the jitted update(average, parameters, skipped) -> the new average, in host memory.

    `skipped`, of a step that may skip its update, keeps the average as it is; others have none. The
    old average is not donated, because a checkpoint that is being written may still read it.
    """
    decay = config.optimizer.ema_decay

    def update(ema: nnx.State, new: nnx.State, skipped: jax.Array | None = None) -> nnx.State:
        def one(average: jax.Array, value: jax.Array, place: NamedSharding) -> jax.Array:
            here = jax.device_put(average, place.with_memory_kind("device"))
            moved = decay * here + (1 - decay) * value
            return moved if skipped is None else lax.select(skipped, here, moved)

        return jax.tree.map(one, ema, new, places.ema)

    return jax.jit(update, out_shardings=places.ema)


def lower(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers a training step that donates its state; without the EMA, which is in host memory.

    Args:
      mesh: real or virtual (`aot.cluster.mesh`), of the sizes of `config.mesh`.
    """
    without = dataclasses.replace(config.optimizer, ema_decay=0.0)
    config = dataclasses.replace(config, optimizer=without)
    layout, adam = meshes.layout(config), optimizers.build(config.optimizer)
    places = states.shardings(config, layout, mesh, adam)
    rest = abstract_arguments(config, layout, mesh, NamedSharding(mesh, P()))
    step = jax.jit(make_step(config, layout, mesh, adam), donate_argnums=0)
    start = states.abstract(config, places, adam)
    with jax.set_mesh(mesh):
        return step.lower(start, *rest)
