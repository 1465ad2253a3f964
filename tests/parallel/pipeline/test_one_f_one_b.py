"""1F1B on stages of one matmul each: gradients against a plain loop, and memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel.pipeline.executor import AXIS
from deepseek_jax.parallel.pipeline.one_f_one_b import OneFOneB

WIDTH, ROOM = 3, 11


@dataclasses.dataclass(frozen=True)
class Matmuls:
    """x -> tanh(x W) on every stage; the loss is the sum of squares of what comes out."""

    weight: jax.Array
    inputs: jax.Array

    def first(self, micro: jax.Array) -> jax.Array:
        return jnp.where(micro < 0, jnp.nan, self.inputs[micro])

    def forward(self, chunk: int, x: jax.Array, on: jax.Array) -> Any:
        y = yield jnp.tanh(x @ self.weight)
        return y, [x, y], jnp.where(on, 1, 100)

    def backward(self, chunk: int, kept: list[jax.Array], d_y: jax.Array, on: jax.Array) -> Any:
        x, y = kept
        d_z = yield d_y * (1 - y**2)
        return d_z @ self.weight.T, x.T @ d_z, []

    def weight_backward(self, chunk: int, later: list[Any]) -> Any:
        raise AssertionError("nothing was left")

    def last(self, micro: jax.Array, y: jax.Array, total: Any) -> Any:
        losses, d_inputs = total
        return (losses.at[micro].add((y**2).sum()), d_inputs), 2 * y

    def first_gradient(self, micro: jax.Array, d_x: jax.Array, total: Any) -> Any:
        losses, d_inputs = total
        return losses, d_inputs.at[micro].add(d_x)


def run_of(ranks, skip=False):
    """(weights [ranks, D, D], inputs [ROOM, 1, D], count) -> what `run` returns, of all ranks."""

    def local(weights, inputs, count):
        like = jax.ShapeDtypeStruct(inputs.shape[1:], inputs.dtype)
        total = jnp.zeros(len(inputs)), jnp.zeros(inputs.shape)
        stages = Matmuls(weights[0], inputs)
        (gradient,), (ran,), total = OneFOneB(ranks, skip).run(stages, like, total, count)
        return gradient[None], ran[None], jax.lax.psum(total, AXIS)

    mesh, specs = small.mesh_of({"pipe": ranks}), (P(AXIS), P(), P())
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=(P(AXIS), P(AXIS), P()), check_vma=False
    )
    places = tuple(NamedSharding(mesh, spec) for spec in specs)
    return lambda *given: mapped(*(jax.reshard(x, to) for x, to in zip(given, places, strict=True)))


def sizes(ranks):
    rng = np.random.default_rng(ranks)
    shapes = (ranks, WIDTH, WIDTH), (ROOM, 1, WIDTH)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def straight(weights, inputs, count):
    """Gradients without a pipeline."""

    def losses(weights, inputs):
        x = inputs
        for weight in weights:
            x = jnp.tanh(x @ weight)
        each = jnp.where(jnp.arange(ROOM) < count, (x**2).sum((1, 2)), 0)
        return each.sum(), each

    gradients, each = jax.grad(losses, (0, 1), has_aux=True)(weights, inputs)
    return gradients[0], (each, gradients[1])


@pytest.mark.parametrize("skip", [False, True], ids=["mask", "skip"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_gradients_of_any_number_of_micro_batches(ranks, skip):
    weights, inputs = sizes(ranks)
    run = jax.jit(run_of(ranks, skip))
    for count in (1, 2, ranks, 2 * ranks - 1, ROOM):
        gradients, ran, total = jax.device_get(run(weights, inputs, jnp.int32(count)))
        small.assert_close((gradients, total), jax.device_get(straight(weights, inputs, count)))
        assert ran.tolist() == [count] * ranks, "sums have what idle chunks recorded"


@pytest.mark.parametrize("ranks", [2, 5])
def test_what_is_held_does_not_grow_with_the_micro_batches(ranks):
    """A loop carries pools of `slots` of what each forward keeps, whatever the traced count is."""
    weights, inputs = sizes(ranks)
    traced = str(jax.make_jaxpr(run_of(ranks))(weights, inputs, jnp.int32(1)))
    pools = f"f32[{2 * ranks - 1},1,{WIDTH}]"
    assert OneFOneB(ranks, False).slots == 2 * ranks - 1
    assert pools in traced


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("count", [1, 3, 20])
def test_slots_are_what_the_first_rank_needs(ranks, count):
    """Slots by the module's formulas: every value is read before its slot is written again."""
    executor, most = OneFOneB(ranks, False), 0
    for rank in range(ranks):
        held: dict[int, int] = {}
        for tick in range(executor.ticks(count)):
            forward, backward = tick - rank, tick - (2 * (ranks - 1) - rank)
            if forward in range(count):
                assert held.setdefault(forward % executor.slots, forward) == forward
            elif forward > 0:
                assert forward % executor.slots not in held, "an idle chunk's is written over it"
            most = max(most, len(held))
            if backward in range(count):
                assert held.pop(backward % executor.slots) == backward
        assert not held
    assert most == min(count, executor.slots)
