"""Two micro-batches in flight: the results of each alone, and no additional messages."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from published import layer, variant

from deepseek_jax.model import remat
from deepseek_jax.model.block import Block
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.overlapped import two_batch
from deepseek_jax.parallel.experts.dispatch import AllToAllDispatch
from deepseek_jax.precision.payload import FP8_PAYLOAD, UNCHANGED_PAYLOAD

TWO_HOP = AllToAllDispatch(
    separate_gpu_hop=True, capacity_factor=math.inf, most_nodes=2, payload=UNCHANGED_PAYLOAD
)
FLAT = dataclasses.replace(TWO_HOP, separate_gpu_hop=False)


def inputs(seed, length):
    x = np.random.default_rng(seed).normal(size=(8, length, 48))
    return jnp.asarray(x, jnp.float32)


def pulled(how, sizes, length):
    """A MoE block and its balance loss: value and gradients of weights and input."""
    _, _, model = variant("v4_values")  # whose clamp every round and pass needs

    def fn(block, x):
        out, routing, _ = block(x, how)
        return out + routing.balance

    x, pull = (inputs(seed, length) for seed in (0, 1))
    return small.spread(fn, layer(model.moe_layers), x, pull, sizes)


# Compared with one micro-batch in flight that recomputes nothing and needs no second round.
# With one hop few tokens: buffers must have room for all choices of one.
@pytest.mark.parametrize(
    "sizes, way, recompute, length",
    [
        pytest.param({"replica": 2}, TWO_HOP, "none", 6, marks=pytest.mark.slow),
        ({"gpu": 4}, dataclasses.replace(FLAT, payload=FP8_PAYLOAD), "full", 3),
        (
            {"node": 2, "gpu": 2, "tensor": 2},
            dataclasses.replace(TWO_HOP, capacity_factor=0.5),
            "report",
            6,
        ),
    ],
    ids=["no hop", "one hop, FP8", "two hops, several rounds"],
)
def test_two_in_flight_are_each_alone(sizes, way, recompute, length):
    one = Execution(dispatch=dataclasses.replace(way, capacity_factor=math.inf))
    two = Execution(dispatch=way, remat=remat.BY_NAME[recompute], in_flight=2)
    small.assert_close(pulled(two, sizes, length), pulled(one, sizes, length), 3e-6)


def test_without_shared_experts():
    config = small.config(model_shared_experts=0).model
    block = Block(config, dense=False, rngs=nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(1), (2, 8, config.d_model))

    def gradients(how):
        return jax.jit(jax.grad(lambda block, x: block(x, how)[0].sum(), (0, 1), allow_int=True))(
            block, x
        )

    small.assert_close(gradients(Execution(in_flight=2)), gradients(Execution()), 3e-6)


def test_every_hop_has_work_beside_it():
    """A letter beside another's, in every turn in which a message travels, as the table shows."""
    assert two_batch.forward_turns(2, "AB") == ["aab", "baa", "ab", "ab", "ba", "ba", "Ab", "Bb"]
    assert two_batch.backward_turns(2, "AB") == ["Bb", "Ab", "ba", "ba", "ab", "ab", "baa", "a"]


def test_redundant_experts_are_refused():
    config = small.config().model
    block = Block(config, dense=False, rngs=nnx.Rngs(params=0))
    block.feed.slots = nnx.data(object())
    with pytest.raises(ValueError, match="in_flight=1"):
        two_batch.layer(block, jnp.zeros((2, 4, config.d_model)), Execution(in_flight=2))


@pytest.mark.parametrize("recompute", ["none", "report", "full"])
def test_backward_keeps_no_weight_of_each_flight(recompute):
    config = small.config().model
    block = jax.eval_shape(lambda: Block(config, dense=False, rngs=nnx.Rngs(params=0)))
    how = Execution(remat=remat.BY_NAME[recompute], in_flight=2)
    x = jax.ShapeDtypeStruct((2, 11, config.d_model), jnp.float32)
    kept = []

    def forward(block, x):
        done, pull = jax.vjp(lambda block, x: two_batch.layer(block, x, how)[0], block, x)
        kept.extend(leaf.shape for leaf in jax.tree.leaves(pull))
        return done

    jax.eval_shape(forward, block, x)
    for weight in (block.feed.experts.gate_up, block.feed.shared.down, block.attention.out):
        assert kept.count(weight.shape) == 1, weight.shape
