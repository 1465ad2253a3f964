"""Gradients are summed in float32, whatever the recipe: over tokens, heads, blocks, rounds, ranks.

In bfloat16, 256 + 1 is 256, so that a long sum stays at 256.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.model import execution, params
from deepseek_jax.model.causal_attention import causal_attention
from deepseek_jax.model.transformer import Embedding
from deepseek_jax.parallel import axes
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.experts import dispatch
from deepseek_jax.parallel.experts.exchange import Exchange
from deepseek_jax.parallel.experts.overflow import Rounds
from deepseek_jax.precision.payload import UNCHANGED_PAYLOAD
from deepseek_jax.train import optimizer, state
from deepseek_jax.train.step import make_gradients, tokens_spec

COUNT = 4096


def test_a_frequent_token():
    """One token 4,096 times, each with a gradient of 1: its row gets 4,096, and not 256."""
    config = small.config(precision_recipe="bfloat16")
    how = execution.of(config)
    graph, weights = nnx.split(Embedding(config.model, rngs=nnx.Rngs(params=0)))
    tokens = jnp.full((8, COUNT // 8), 5, jnp.int32)

    def total(weights):
        return nnx.merge(graph, weights)(tokens, how).astype(jnp.float32).sum()

    (grad,) = jax.tree.leaves(jax.jit(jax.grad(total))(params.prepare(weights, how.recipe)))
    want = np.zeros(grad.shape)
    want[5] = COUNT
    np.testing.assert_array_equal(np.asarray(grad, np.float64), want)


def test_keys_that_several_blocks_of_queries_meet():
    """The last block adds 256 to the gradient of the first value, eight others add 1 each."""
    length = 9
    shape = (1, length, 1, 4)
    key = jnp.zeros(shape, jnp.bfloat16).at[:, 0].set(64.0)  # gets all attention of every query
    query = jnp.full(shape, 8.0, jnp.bfloat16)
    pull = jnp.ones(shape).at[:, -1].set(256.0)

    def total(value):
        out = causal_attention(query, key, value, scale=1.0, block=1)
        return jnp.sum(pull * out.astype(jnp.float32))

    got = jax.jit(jax.grad(total))(jnp.zeros(shape, jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(got[0, 0, 0], np.float32), 256 + length - 1)


def test_experts_over_many_rounds():
    """A buffer of one row: 600 rounds, each of which adds 1 to the weight's gradient."""
    rows, mesh = 600, small.mesh_of({})
    how = dispatch.AllToAllDispatch(True, 1 / rows, 1, UNCHANGED_PAYLOAD)
    tokens = jnp.ones((rows, 4), jnp.bfloat16)
    weights, chosen = jnp.ones((rows, 1)), jnp.zeros((rows, 1), jnp.int32)

    def work(weight, arrived):
        return arrived.rows * weight[None]

    rounds = Rounds(how, work)

    def total(weight):
        every_choice = jnp.ones((rows, 1), jnp.bool_)
        exchange = Exchange(tokens, weights, chosen, every_choice, 1, weight)
        first, served = rounds.one(exchange)
        out, count = rounds.rest(exchange.after(served), first)
        return out.astype(jnp.float32).sum(), count

    def local(weight):
        with axes.active(small.layout_of({})):
            return jax.grad(total, has_aux=True)(weight)

    run = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    with jax.set_mesh(mesh):
        grad, count = jax.jit(run)(jnp.ones((4,), jnp.bfloat16))
    assert count > 256
    np.testing.assert_array_equal(np.asarray(grad, np.float32), rows)


# Sums over activations between tensor-parallel ranks stay in the recipe's dtype: `axes.fan_in`.
SUMS = {"reduce_sum", "cumsum", "scatter-add", "psum", "psum_invariant", "reduce_scatter"}
LAYOUTS = {
    "reference dispatch": dict(layout_dispatch="reference"),
    "recomputed, two in flight": dict(
        mesh_gpu=2, layout_recompute="full", layout_micro_batches_in_flight=2
    ),
    "ZeRO-3": dict(mesh_replica=2, mesh_node=2, layout_zero=3),
    "pipeline": dict(mesh_pipe=2, mesh_node=2, layout_zero=1, layout_defer_weight_gradients=True),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_sum_of_a_step_is_in_bfloat16(layout):
    config = small.config(
        precision_recipe="bfloat16", model_mtp_depth=1, layout_rules=small.NARROW,
        layout_capacity_factor=0.6, **layout,
    )  # fmt: skip
    narrow = {
        (eqn.primitive.name, *(str(v.aval) for v in eqn.outvars))
        for eqn in equations(config)
        if eqn.primitive.name in SUMS and in_bfloat16(eqn)
    }
    assert not narrow, narrow


def in_bfloat16(eqn):
    """True for a sum of more than one term: JAX removes axes of size 1 by sums."""
    given, made = eqn.invars[0].aval, eqn.outvars[0].aval
    one = eqn.primitive.name == "reduce_sum" and given.size == made.size
    return not one and any(v.aval.dtype == jnp.bfloat16 for v in eqn.outvars)


def equations(config):
    """Every equation of a step's gradients, also those within others."""
    layout, batch = meshes.layout(config), config.batch
    mesh, adam = small.mesh_of(layout.sizes), optimizer.build(config.optimizer)
    places = state.shardings(config, layout, mesh, adam)
    start = state.abstract(config, places, adam)
    shape = 2, batch.micro_sequences, batch.length + 1
    place = NamedSharding(mesh, tokens_spec(layout))
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    whole = NamedSharding(mesh, P())
    count, weight = (
        jax.ShapeDtypeStruct((), dtype, sharding=whole) for dtype in (jnp.int32, jnp.float32)
    )
    with jax.set_mesh(mesh):
        gradients = jax.jit(make_gradients(config, layout, mesh))
        traced = gradients.trace(start.params, start.bias, tokens, count, weight)
    return list(walk(traced.jaxpr.jaxpr))


def walk(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)
