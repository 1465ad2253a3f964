"""Pipeline executor on a model of one matmul per stage."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel.pipeline.executor import AXIS, Pipeline
from deepseek_jax.parallel.pipeline.lockstep import BidirectionalStages, lockstep
from deepseek_jax.parallel.pipeline.schedule import BY_NAME

RANKS, COUNT, WIDTH = 4, 10, 3


@dataclasses.dataclass(frozen=True)
class Matmuls:
    """Stage s multiplies by weights[s]; the loss of a micro-batch is the sum of its numbers."""

    weights: jax.Array  # [chunk, D, D] of this rank
    inputs: jax.Array  # [micro, 1, D]
    defer: bool

    def first(self, micro):
        return self.inputs[jnp.maximum(micro, 0)]

    def forward(self, chunk, x, on):
        y = yield x @ self.weights[chunk]
        return y, [x], jnp.float32(1)

    def backward(self, chunk, kept, d_y, on):
        d_x = yield d_y @ self.weights[chunk].T
        if self.defer:
            return d_x, jnp.zeros_like(self.weights[chunk]), [kept[0], d_y]
        return d_x, kept[0].T @ d_y, []

    def weight_backward(self, chunk, later):
        return later[0].T @ later[1]

    def last(self, micro, y, total):
        return total + y.sum(), jnp.ones_like(y)

    def first_gradient(self, micro, d_x, total):
        return total


def run(kind: str, skip: bool, defer: bool) -> tuple[Any, ...]:
    """(gradients [stage, D, D], chunks that were run, the loss)."""
    made = BY_NAME[kind](RANKS, COUNT)
    ticks, wall = lockstep(made, defer), BidirectionalStages(made.ranks, made.stages)
    stages = np.array([[wall.stage(rank, chunk) for chunk in (0, 1)] for rank in range(RANKS)])
    weights, inputs = numbers(made.stages)
    mesh = small.mesh_of({"pipe": RANKS})

    def local(weights, inputs):
        model = Matmuls(weights[0], inputs, defer)
        pipeline = Pipeline(wall, ticks.slots, ["fb"], skip)
        tables = {name: jnp.asarray(table) for name, table in ticks.tables.items()}
        edges = tuple(jnp.int32(n) for n in (*ticks.steady, ticks.count))
        like = jax.ShapeDtypeStruct((1, WIDTH), jnp.float32)
        gradients, sums, total = pipeline.run(model, like, jnp.float32(0), tables, edges)
        return jnp.stack(gradients)[None], jax.lax.psum((sum(sums), total), AXIS)

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(AXIS), P()),
        out_specs=(P(AXIS), P()),
        check_vma=False,
    )
    places = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())
    given = jax.device_put((weights[stages], inputs), places)
    with jax.set_mesh(mesh):
        each, (chunks, loss) = jax.jit(mapped)(*given)
    total = np.zeros((made.stages, WIDTH, WIDTH), np.float32)
    np.add.at(total, stages, np.asarray(each))
    return total, chunks, loss


def numbers(stages: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(stages, WIDTH, WIDTH)).astype(np.float32)
    return weights, rng.normal(size=(COUNT, 1, WIDTH)).astype(np.float32)


def wanted(stages: int) -> tuple[np.ndarray, float]:
    """Gradients and loss in float64, one stage after another."""
    weights, inputs = (x.astype(np.float64) for x in numbers(stages))
    values, d_y = [inputs.reshape(COUNT, WIDTH)], np.ones((COUNT, WIDTH))
    for weight in weights:
        values.append(values[-1] @ weight)
    gradients = []
    for weight, x in zip(weights[::-1], values[-2::-1], strict=True):
        gradients.append(x.T @ d_y)
        d_y = d_y @ weight.T
    return np.array(gradients[::-1]), values[-1].sum()


@pytest.mark.parametrize("defer", [False, True], ids=["at once", "deferred"])
@pytest.mark.parametrize("skip", [False, True], ids=["mask", "skip"])
@pytest.mark.parametrize("kind", ["dualpipe", "dualpipev"])
def test_gradients(kind, skip, defer):
    gradients, chunks, loss = run(kind, skip, defer)
    want, want_loss = wanted(len(gradients))
    np.testing.assert_allclose(gradients, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-4)
    assert chunks == len(gradients) * COUNT
