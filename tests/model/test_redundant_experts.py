"""Redundant experts: equal results, with the work spread over their copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.model import params
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.redundant_experts import with_redundant_experts
from deepseek_jax.model.transformer import build_model
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.experts.balancer import place
from deepseek_jax.parallel.experts.dispatch import AllToAllDispatch
from deepseek_jax.precision.payload import UNCHANGED_PAYLOAD

CONFIG = small.config(model_layers=3, model_mtp_depth=0).model
SLOTS = 16


def model_and_tokens():
    model = build_model(CONFIG, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab, (8, 16), np.int32)
    return model, tokens


def top(model, tokens, how):
    return model.trunk(tokens, how)


def placement(nodes, gpus):
    """Placement for uneven loads: the first expert has four times the load of the others."""
    load = np.random.default_rng(1).uniform(1, 2, (CONFIG.moe_layers, CONFIG.experts))
    load[:, 0] *= 4
    return place(load, slots=SLOTS, groups=CONFIG.groups, nodes=nodes, gpus=gpus)


def test_the_slots_hold_their_experts_weights():
    model, _ = model_and_tokens()
    where = placement(2, 4)
    held = with_redundant_experts(model, where).moe_layers.feed.experts
    for layer, experts in enumerate(where.expert_of_slot):
        assert len(set(experts)) == CONFIG.experts < SLOTS
        for name in ("gate_up", "down"):
            want = getattr(model.moe_layers.feed.experts, name)[...][layer, experts]
            np.testing.assert_array_equal(getattr(held, name)[...][layer], want)
    assert model.moe_layers.feed.experts.down[...].shape[1] == CONFIG.experts  # unchanged


@pytest.mark.parametrize("sizes", [{}, {"node": 2, "gpu": 2}, {"gpu": 4}], ids=str)
@pytest.mark.parametrize("buffer", [1.0, 4.0])
def test_redundant_experts_give_the_same_numbers(sizes, buffer):
    model, tokens = model_and_tokens()
    want = jax.jit(lambda m, t: top(m, t, Execution()))(model, tokens)
    layout = small.layout_of(sizes)
    nodes = sizes.get("node", 1)
    copied = with_redundant_experts(model, placement(nodes, nodes * sizes.get("gpu", 1)))
    how = Execution(dispatch=AllToAllDispatch(True, buffer, CONFIG.top_groups, UNCHANGED_PAYLOAD))
    graph, state = nnx.split(copied)
    spec = params.place(state, lambda names, _: layout.spec(names))
    batch, mesh = P(layout.mesh_axes("batch") or None), small.mesh_of(sizes)

    def local(state, tokens):
        with axes.active(layout):
            out = top(nnx.merge(graph, state), tokens, how)
            return out.hidden, out.routing.traffic.rounds[None]

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, batch), out_specs=(batch, batch), check_vma=False
    )
    places = jax.tree.map(lambda one: NamedSharding(mesh, one), (spec, batch))
    with jax.set_mesh(mesh):
        got, rounds = jax.device_get(jax.jit(run)(*jax.device_put((state, tokens), places)))
    np.testing.assert_allclose(got, want.hidden, rtol=2e-5, atol=2e-5 * np.abs(want.hidden).max())
    assert buffer > 1 or not sizes or rounds.max() > 1  # overflow rounds use the slots too


def test_copies_share_the_work():
    """The rows that reach each slot: an expert's tokens, split evenly among its copies."""
    model, _ = model_and_tokens()
    where = placement(1, 1)
    feed = jax.tree.map(lambda x: x[0], with_redundant_experts(model, where).moe_layers.feed)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(8, 16, CONFIG.d_model)), jnp.float32)
    gated = feed.gate(x)
    load = np.asarray(gated.routing.load)
    everything = jnp.ones_like(gated.chosen, dtype=jnp.bool_)
    exchange = gated.exchange(feed.experts.weights(), feed.places, everything)
    sizes = np.asarray(Execution().dispatch.send(exchange).sizes)
    for expert, copies in enumerate(where.copies[0]):
        rows = sizes[where.slots_of_expert[0, expert, :copies]]
        assert rows.sum() == load[expert] and rows.max() - rows.min() <= 1
    assert where.copies[0, 0] > 1
