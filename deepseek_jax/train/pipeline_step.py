"""Gradients of a step whose layers are pipelined over `pipe`: this model under its schedules."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import Config, ModelConfig
from deepseek_jax.model import execution, params
from deepseek_jax.model.overlapped import stage_params
from deepseek_jax.model.overlapped.layer_pass import hops_of
from deepseek_jax.model.overlapped.stage import Stage, StageChunks, turns
from deepseek_jax.model.params import split
from deepseek_jax.model.transformer import Transformer, abstract_model
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.axes import DATA_AXES, Layout
from deepseek_jax.parallel.pipeline import schedule
from deepseek_jax.parallel.pipeline.executor import AXIS, Pipeline
from deepseek_jax.parallel.pipeline.lockstep import IDLE, BidirectionalStages, TickTables, lockstep
from deepseek_jax.parallel.pipeline.one_f_one_b import LinearStages, OneFOneB
from deepseek_jax.parallel.pipeline.stage_assignment import (
    LayerAssignment,
    assign_layers,
    stage_map,
)
from deepseek_jax.precision import weight_gradients
from deepseek_jax.train.index_training import in_training, index_weight
from deepseek_jax.train.last_stage import LastStage
from deepseek_jax.train.token_schedule import fewest_micro_batches, most_micro_batches


def padded_micro_batches(config: Config, count: int) -> int:
    """Micro-batches of the schedule that runs `count` real ones: even, and at least 2 * pipe."""
    least = max(count, 2 * config.mesh.pipe)
    return least + least % 2


def timetables(config: Config) -> list[TickTables]:
    """Tick tables of every number of micro-batches that the batch ramp reaches, in order."""
    first, last = (
        padded_micro_batches(config, count(config.batch))
        for count in (fewest_micro_batches, most_micro_batches)
    )
    make = schedule.BY_NAME[config.layout.pipeline]
    defer = config.layout.defer_weight_gradients
    return [lockstep(make(config.mesh.pipe, count), defer) for count in range(first, last + 1, 2)]


def make_gradients(
    config: Config, layout: Layout, mesh: Mesh, tokens_spec: P
) -> Callable[..., Any]:
    """Makes a step's gradient function, as `step.make_gradients`, for a pipeline.

    Args:
      tokens_spec: PartitionSpec of the tokens AB(S+1).

    Returns:
      gradients(masters, biases, tokens, count, mtp_weight) -> (gradients float32, placed as
      `Layout.storage`; `Sums` over all ranks).
    """
    graph, abstract, abstract_bias = split(abstract_model(config.model))
    stored = params.place(abstract, layout.storage)
    how = dataclasses.replace(in_training(config), in_flight=1)
    where = assign_layers(config)
    run_all = _executor(config)
    summed = (*(name for name in DATA_AXES if layout.sizes[name] > 1), AXIS)

    def local(
        masters: nnx.State,
        bias: nnx.State,
        tokens: jax.Array,
        count: jax.Array,
        mtp_weight: jax.Array,
    ) -> tuple[Any, Any]:
        with axes.active(layout):
            model: Any = nnx.merge(graph, params.prepare(masters, how.recipe), bias)
            sequences = (count * config.batch.micro_sequences).astype(jnp.float32)
            balance = config.schedule.balance_alpha / sequences
            index = index_weight(config, sequences)
            rows = stage_params.fetch_stage_params(model, where, config.model, layout)
            chunks = [
                Stage(
                    stage_params.slots(rows, where, chunk, config.model),
                    how,
                    config.model.experts,
                    balance,
                    config.layout.defer_weight_gradients,
                    index,
                )
                for chunk in range(where.chunks)
            ]
            ends = params.gather(stage_params.ends(model), layout)
            # Backward of an MTP module is in the same tick as its forward: its residuals live as
            # long, and "report" keeps enough of them to send no message twice.
            last_stage = LastStage(
                dataclasses.replace(how, remat=how.remat.within_tick()),
                config.layout.loss_chunk,
                mtp_weight,
                config.schedule.balance_alpha,
                sequences,
                index,
            )
            run = _ModelStages(chunks, ends, tokens, how, last_stage)
            shape = tokens.shape[1], tokens.shape[2] - 1, config.model.d_model
            like: Any = jax.ShapeDtypeStruct(shape, how.recipe.activation_dtype)
            gradients, sums, total = run_all(run, like, run.nothing(like), count)
            grads = stage_params.return_gradients(
                model, gradients, total[0], where, config.model, layout
            )
            return grads, lax.psum(_all_sums(sums, total[1], where, config.model), summed)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(stored, jax.tree.map(lambda _: P(), abstract_bias), tokens_spec, P(), P()),
        out_specs=(stored, P()),
        check_vma=False,
    )


def _executor(config: Config) -> Callable[..., Any]:
    """Makes run(stages, like, total, count), `Pipeline.run` or that of 1F1B by layout.pipeline.

    `run` is called where the layout is active, because the hops of a message depend on it.
    """
    held, skip = stage_map(config), config.layout.ramps == "skip"
    if isinstance(held, LinearStages):
        return OneFOneB(held.ranks, skip).run
    tables = timetables(config)
    slots = {name: max(ticks.slots[name] for ticks in tables) for name in tables[0].slots}

    def run(stages: _ModelStages, like: jax.Array, total: Any, count: jax.Array) -> Any:
        both_ways = turns(assign_layers(config).slots, hops_of(stages.how))
        pipeline = Pipeline(held, slots, both_ways, skip)
        return pipeline.run(stages, like, total, *_timetable(tables, config, count, held))

    return run


@dataclasses.dataclass(frozen=True)
class _ModelStages(StageChunks):
    """This model as the executor's `Stages`; a total is (gradients of the ends, Sums).

    Attributes:
      ends: the model without layers: embedding, norms, head and MTP modules.
      tokens: AB(S+1).
      how: execution of the layers.
      last_stage: loss and MTP modules, after the last layer.
    """

    ends: Transformer
    tokens: jax.Array
    how: execution.Execution
    last_stage: LastStage

    def first(self, micro: jax.Array) -> jax.Array:
        return self.ends.embedding(self._tokens(micro)[:, :-1], self.how)

    def last(self, micro: jax.Array, y: jax.Array, total: Any) -> tuple[Any, jax.Array]:
        tokens = self._tokens(micro)
        grads, d_y, sums = self.last_stage.gradients(self.ends, y, tokens)
        return jax.tree.map(_add, total, (grads, sums)), d_y

    def first_gradient(self, micro: jax.Array, d_x: jax.Array, total: Any) -> Any:
        grads, sums = total
        tokens = self._tokens(micro)[:, :-1]
        _, vjp = jax.vjp(lambda embedding: embedding(tokens, self.how), self.ends.embedding)
        grads.embedding = jax.tree.map(_add, grads.embedding, vjp(d_x)[0])
        return grads, sums

    def nothing(self, like: jax.Array) -> Any:
        """Total of no micro-batch: zeros in float32."""
        y = jnp.zeros(like.shape, like.dtype)
        *_, sums = jax.eval_shape(self.last_stage.gradients, self.ends, y, self.tokens[0])
        ends = weight_gradients.carriers(self.ends)
        grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), ends)
        return grads, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums)

    def _tokens(self, micro: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(self.tokens, jnp.maximum(micro, 0), 0, keepdims=False)


MICRO = ("f_micro", "b_micro", "w_micro")  # columns of a tick table that hold micro-batches


def _timetable(
    tables: list[TickTables], config: Config, count: jax.Array, held: BidirectionalStages
) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    """Tick table of this step's number of micro-batches, and its steady phase and length.

    Ticks of micro-batches from `count` on, which only fill the schedule, are idle.
    """
    longest = max(ticks.count for ticks in tables)
    least = padded_micro_batches(config, fewest_micro_batches(config.batch))
    numbers = range(least, least + 2 * len(tables), 2)
    which = jnp.searchsorted(jnp.asarray(numbers), count)

    def all_of(name: str) -> np.ndarray:
        each = [_alternated(t, name, n, held) for t, n in zip(tables, numbers, strict=True)]
        room = [((0, longest - len(column)), (0, 0)) for column in each]
        return np.stack([np.pad(*both) for both in zip(each, room, strict=True)])

    chosen = {name: jnp.asarray(all_of(name))[which] for name in tables[0].tables}
    for name in MICRO:
        chosen[name] = jnp.where(chosen[name] < count, chosen[name], IDLE)
    edges = np.array([(*ticks.steady, ticks.count) for ticks in tables], np.int32)
    first, end, last = jnp.asarray(edges)[which]
    return chosen, (first, end, last)


def _alternated(ticks: TickTables, name: str, count: int, held: BidirectionalStages) -> np.ndarray:
    """A column of micro-batches, those of DualPipe's two directions numbered alternately.

    The highest numbers, which may be padding, are then the last of each direction.
    """
    column = ticks.tables[name]
    if name not in MICRO or not held.mirrored:
        return column
    half = count // 2
    alternated = np.where(column < half, 2 * column, 2 * (column - half) + 1)
    return np.where(column == IDLE, IDLE, alternated).astype(np.int32)


def _all_sums(sums: list[Any], ends: Any, where: LayerAssignment, config: ModelConfig) -> Any:
    """`Sums` of this rank's chunks and ends, rows scattered to the global layer index."""
    load, balance, traffic, index = jax.tree.map(lambda *each: jnp.concatenate(each), *sums)
    rows = where.rows(config.dense_layers, config.moe_layers)
    mine = jnp.asarray(rows)[lax.axis_index(AXIS)]

    def at_layer(value: jax.Array) -> jax.Array:
        start = jnp.zeros((config.moe_layers + 1, *value.shape[1:]), value.dtype)
        return start.at[mine].set(value)[: config.moe_layers]  # a rank has a layer once

    layers = jax.tree.map(at_layer, (load, traffic))
    if config.mtp_depth:
        both = (ends.load, ends.traffic)
        layers = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), layers, both)
    total = ends.balance + balance.sum()
    index = None if index is None else ends.index + index.sum()
    return dataclasses.replace(ends, balance=total, load=layers[0], traffic=layers[1], index=index)


def _add(total: jax.Array, more: jax.Array) -> jax.Array:
    return total + more.astype(total.dtype)
