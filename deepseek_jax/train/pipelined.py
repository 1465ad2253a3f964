"""The gradients of a step where layers are spread over `pipe`: DualPipe with this model's stages."""

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
from deepseek_jax.model import stage as stage_steps
from deepseek_jax.model.flights import Kind, hops_of
from deepseek_jax.model.stage import Slot, Stage
from deepseek_jax.model.transformer import Transformer, Trunk, abstract_model
from deepseek_jax.parallel import axes, schedule, stages
from deepseek_jax.parallel.axes import DATA_AXES, Layout
from deepseek_jax.parallel.pipeline import AXIS, Pipeline
from deepseek_jax.parallel.stages import Places
from deepseek_jax.parallel.ticks import IDLE, Ticks, Wall, lockstep
from deepseek_jax.parallel.turns import Steps
from deepseek_jax.train.schedule import fewest_micro_batches, most_micro_batches
from deepseek_jax.train.state import split


def wall(config: Config) -> Wall:
    """Who holds which stage."""
    ranks = config.mesh.pipe
    return Wall(ranks, ranks if config.layout.pipeline == "dualpipe" else 2 * ranks)


def places(config: Config) -> Places:
    held = wall(config)
    given = stages.layers_per_stage(config.model.layers, held.stages, config.layout.stage_layers)
    return stages.places(held, given)


def padded_micro_batches(config: Config, count: int) -> int:
    """Micro-batches of the schedule that runs `count` of them: the schedules need 2 * pipe."""
    least = max(count, 2 * config.mesh.pipe)
    return least + least % 2


def timetables(config: Config) -> list[Ticks]:
    """Of every number of micro-batches that the batch ramp can ask for, in order."""
    first, last = (
        padded_micro_batches(config, count(config.batch))
        for count in (fewest_micro_batches, most_micro_batches)
    )
    make = schedule.BY_NAME[config.layout.pipeline]
    return [lockstep(make(config.mesh.pipe, count)) for count in range(first, last + 1, 2)]


def make_gradients(
    config: Config, layout: Layout, mesh: Mesh, loss_of: Callable[..., Any], tokens_spec: P
) -> Callable[..., Any]:
    """(masters, biases, tokens, count, mtp_weight) -> (gradients as `storage`, Sums over all).

    Args:
      loss_of: `step.loss_of`.
      tokens_spec: where tokens live.
    """
    graph, abstract, abstract_bias = split(abstract_model(config.model))
    stored = params.place(abstract, layout.storage)
    how = dataclasses.replace(execution.of(config), flights=1)
    held, where, tables = wall(config), places(config), timetables(config)
    slots = {name: max(ticks.slots[name] for ticks in tables) for name in tables[0].slots}
    skip = config.layout.ramps == "skip"
    summed = (*(name for name in DATA_AXES if layout.sizes[name] > 1), AXIS)

    def local(masters, bias, tokens, count, mtp_weight):
        with axes.active(layout):
            model: Any = nnx.merge(graph, params.cast(masters, how.recipe.compute), bias)
            sequences = (count * config.batch.micro_sequences).astype(jnp.float32)
            balance = config.schedule.balance_alpha / sequences
            rows = _fetch(model, where, config.model, layout)
            chunks = [
                Stage(_slots(rows, where, chunk, config.model), how, config.model.experts, balance)
                for chunk in (0, 1)
            ]
            ends = params.gather(_ends(model), layout)

            def loss(ends, y, micro):
                trunk = Trunk(ends.norm(y), None, ends.embedding(micro, how))
                return loss_of(
                    ends,
                    micro,
                    ends.heads(trunk, how, ahead=1),
                    chunk=config.layout.loss_chunk,
                    mtp_weight=mtp_weight,
                    alpha=config.schedule.balance_alpha,
                    sequences=sequences,
                )

            run = _Run(chunks, ends, tokens, how, loss)
            slots_turns = stage_steps.turns(where.slots, hops_of(how))
            pipeline = Pipeline(held, slots, slots_turns, skip)
            rows_of, steady = _timetable(tables, config, count, held)
            shape = tokens.shape[1], tokens.shape[2] - 1, config.model.d_model
            like: Any = jax.ShapeDtypeStruct(shape, how.recipe.compute)
            gradients, sums, total = pipeline.run(run, like, run.nothing(like), rows_of, steady)
            grads = _bring_home(model, gradients, total[0], where, config.model, layout)
            return grads, lax.psum(_all_sums(sums, total[1], where, config.model), summed)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(stored, jax.tree.map(lambda _: P(), abstract_bias), tokens_spec, P(), P()),
        out_specs=(stored, P()),
        check_vma=False,
    )


@dataclasses.dataclass(frozen=True)
class _Run:
    """This model as the executor's `Stages`. A total is (gradients of the ends, Sums)."""

    chunks: list[Stage]
    ends: Transformer
    tokens: jax.Array  # AB(S+1)
    how: execution.Execution
    loss: Callable[..., Any]

    def first(self, micro: jax.Array) -> jax.Array:
        return self.ends.embedding(self._tokens(micro)[:, :-1], self.how)

    def forward(self, chunk: int, x: jax.Array, on: jax.Array) -> Steps[Any]:
        return self.chunks[chunk].forward(x, on)

    def backward(self, chunk: int, kept: Any, d_y: jax.Array, on: jax.Array) -> Steps[Any]:
        return self.chunks[chunk].backward(kept, d_y, on)

    def last(self, micro: jax.Array, y: jax.Array, total: Any) -> tuple[Any, jax.Array]:
        tokens = self._tokens(micro)
        (grads, d_y), sums = jax.grad(self.loss, (0, 1), has_aux=True)(self.ends, y, tokens)
        return jax.tree.map(_add, total, (grads, sums)), d_y

    def first_gradient(self, micro: jax.Array, d_x: jax.Array, total: Any) -> Any:
        grads, sums = total
        tokens = self._tokens(micro)[:, :-1]
        _, pull = jax.vjp(lambda embedding: embedding(tokens, self.how), self.ends.embedding)
        grads.embedding = jax.tree.map(_add, grads.embedding, pull(d_x)[0])
        return grads, sums

    def nothing(self, like: jax.Array) -> Any:
        """Zeros, float32, to add to."""
        y = jnp.zeros(like.shape, like.dtype)
        sums = jax.eval_shape(self.loss, self.ends, y, self.tokens[0])[1]
        grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), self.ends)
        return grads, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums)

    def _tokens(self, micro: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(self.tokens, jnp.maximum(micro, 0), 0, keepdims=False)


def _timetable(
    tables: list[Ticks], config: Config, count: jax.Array, held: Wall
) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    """That of this step's number of micro-batches; those that there are not are idle."""
    longest = max(ticks.count for ticks in tables)
    numbers = [
        padded_micro_batches(config, fewest_micro_batches(config.batch)) + 2 * i
        for i in range(len(tables))
    ]
    which = jnp.searchsorted(jnp.asarray(numbers), count)

    def stacked(name: str) -> np.ndarray:
        columns = [_data_order(ticks, name, n, held) for ticks, n in zip(tables, numbers)]
        return np.stack(
            [
                np.pad(column, ((0, longest - len(column)), (0, 0)), constant_values=IDLE)
                for column in columns
            ]
        )

    chosen = {name: jnp.asarray(stacked(name))[which] for name in tables[0].tables}
    for name in ("f_micro", "b_micro"):
        chosen[name] = jnp.where(chosen[name] < count, chosen[name], IDLE)
    edges = np.array([(*ticks.steady, ticks.count) for ticks in tables], np.int32)
    first, end, last = jnp.asarray(edges)[which]
    return chosen, (first, end, last)


def _data_order(ticks: Ticks, name: str, count: int, held: Wall) -> np.ndarray:
    """DualPipe's two streams take turns, so that micro-batches that are missing are its last."""
    column = ticks.tables[name]
    if name not in ("f_micro", "b_micro") or not held.mirrored:
        return column
    half = count // 2
    turned = np.where(column < half, 2 * column, 2 * (column - half) + 1)
    return np.where(column == IDLE, IDLE, turned).astype(np.int32)


# Weights: from the model's layers to slots, and gradients back.

_BOTH = ("attention_norm", "attention", "feed_norm")  # what a dense and a MoE layer both have


def _stacks(model: Any, config: ModelConfig) -> dict[str, tuple[list[Any], int, list[int]]]:
    """Every part of a slot: the stacks that it comes from, their first layer and layers each."""
    dense, moe = config.dense_layers, config.moe_layers
    mixture = model.moe_layers
    parts: dict[str, tuple[list[Any], int, list[int]]] = {}
    for name in _BOTH:
        stacks = [getattr(model.dense_layers, name)] if dense else []
        parts[name] = [*stacks, getattr(mixture, name)], 0, [*([dense] if dense else []), moe]
    parts["router"] = [mixture.feed.router], dense, [moe]
    parts["experts"] = [mixture.feed.experts], dense, [moe]
    if config.shared_experts:
        parts["shared"] = [mixture.feed.shared], dense, [moe]
    if dense:
        parts["dense"] = [model.dense_layers.feed], 0, [dense]
    return parts


def _fetch(model: Any, where: Places, config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Each part, with this rank's rows: chunk 0's slots, then chunk 1's."""
    return {
        name: params.to_stages(stacks, where.rows(first, sum(layers)), layout)
        for name, (stacks, first, layers) in _stacks(model, config).items()
    }


def _slots(rows: dict[str, Any], where: Places, chunk: int, config: ModelConfig) -> list[Slot]:
    slots, rank = [], lax.axis_index(AXIS)
    for slot in range(where.slots):
        layer = where.layers[:, chunk, slot]
        row = chunk * where.slots + slot
        modules = {name: jax.tree.map(lambda x: x[row], part) for name, part in rows.items()}
        dense = (layer >= 0) & (layer < config.dense_layers)
        if not _dense_slot(where, slot, config):
            modules.pop("dense", None)
        kind = Kind(
            routed=jnp.asarray(layer >= config.dense_layers)[rank], dense=jnp.asarray(dense)[rank]
        )
        slots.append(Slot(modules, kind))
    return slots


def _dense_slot(where: Places, slot: int, config: ModelConfig) -> bool:
    """Whether some rank has a dense layer there."""
    layers = where.layers[:, :, slot]
    return bool(((layers >= 0) & (layers < config.dense_layers)).any())


def _bring_home(
    model: Any,
    gradients: list[list[dict[str, Any]]],
    ends: Any,
    where: Places,
    config: ModelConfig,
    layout: Layout,
) -> nnx.State:
    """Gradients of both chunks' slots and of the ends -> those of the masters."""
    slots = [slot for chunk in gradients for slot in chunk]
    for name, (stacks, first, layers) in _stacks(model, config).items():
        like = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], jnp.float32), stacks[0])
        parts = [slot.get(name) for slot in slots]
        some = next(part for part in parts if part is not None)
        parts = [jax.tree.map(jnp.zeros_like, some) if part is None else part for part in parts]
        del like
        stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *parts)
        rows = where.rows(first, sum(layers))
        home = params.from_stages(stacked, rows, layers, layout)
        owners = _owners(model, name, config)
        for (owner, attribute), value in zip(owners, home, strict=True):
            setattr(owner, attribute, value)
    reduced = params.reduce_gradients(ends, layout, scattered=False)
    for name in ("embedding", "norm", "head", *(["mtp"] if config.mtp_depth else [])):
        setattr(model, name, getattr(reduced, name))
    return split(model)[1]


def _owners(model: Any, name: str, config: ModelConfig) -> list[tuple[Any, str]]:
    """Which module's attribute each of a part's stacks is."""
    mixture = model.moe_layers
    if name in _BOTH:
        dense = [(model.dense_layers, name)] if config.dense_layers else []
        return [*dense, (mixture, name)]
    return [(model.dense_layers, "feed")] if name == "dense" else [(mixture.feed, name)]


def _ends(model: Any) -> Any:
    """What stands before the first layer and after the last, as a model without layers."""
    config = dataclasses.replace(model.config, layers=0, dense_layers=0)
    graph, weights, bias = split(abstract_model(config))
    ends: Any = nnx.merge(graph, weights, bias)
    for name in ("embedding", "norm", "head", *(["mtp"] if config.mtp_depth else [])):
        setattr(ends, name, getattr(model, name))
    return ends


def _all_sums(sums: list[Any], ends: Any, where: Places, config: ModelConfig) -> Any:
    """Sums of this rank's chunks and ends, with those of its layers in the layers' places."""
    load, balance, traffic = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *sums)
    rows = where.rows(config.dense_layers, config.moe_layers)
    mine = jnp.asarray(rows)[lax.axis_index(AXIS)]

    def at_home(value: jax.Array) -> jax.Array:
        start = jnp.zeros((config.moe_layers + 1, *value.shape[1:]), value.dtype)
        return start.at[mine].add(value)[: config.moe_layers]

    layers = jax.tree.map(at_home, (load, traffic))
    if config.mtp_depth:
        both = (ends.load, ends.traffic)
        layers = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), layers, both)
    total = ends.balance + balance.sum()
    return dataclasses.replace(ends, balance=total, load=layers[0], traffic=layers[1])


def _add(total: jax.Array, more: jax.Array) -> jax.Array:
    return total + more.astype(total.dtype)
