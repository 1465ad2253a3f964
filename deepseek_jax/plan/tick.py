"""One training step of a pipeline, compiled for the cluster it is meant for, and its ticks.

The body of the loop over ticks holds two of them, one of either parity; what its messages travel
under, what it copies and how long a replay of it takes is read from there. Nothing runs here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import Config
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.pipeline import BACKWARD, FORWARD
from deepseek_jax.plan import layer, profile
from deepseek_jax.plan.compiled import Collective, Copy, Gemm, Program
from deepseek_jax.train import optimizer, schedule, state
from deepseek_jax.train.step import make_step, tokens_spec

KERNELS = layer.KERNELS


def lower(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """A training step, its state donated; the average, which is in host memory, left out.

    Args:
      mesh: real or virtual (`cluster.mesh`), of the sizes of `config.mesh`.
    """
    without = dataclasses.replace(config.optimizer, ema_decay=0.0)
    config = dataclasses.replace(config, optimizer=without)
    layout, adam = meshes.layout(config), optimizer.build(config.optimizer)
    places = state.shardings(config, layout, mesh, adam)
    whole, batch = NamedSharding(mesh, P()), config.batch

    def number(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((), dtype, sharding=whole)

    tokens = jax.ShapeDtypeStruct(
        (schedule.most_micro_batches(batch), batch.micro_sequences, batch.length + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, tokens_spec(layout)),
    )
    hyper = schedule.Hyper(*(number(jnp.float32) for _ in dataclasses.fields(schedule.Hyper)))
    step = jax.jit(make_step(config, layout, mesh, adam), donate_argnums=0)
    with jax.set_mesh(mesh):
        return step.lower(state.abstract(config, places, adam), tokens, number(jnp.int32), hyper)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two ticks, as a compiled program's loop body has them.

    Attributes:
      computation: its name in the program.
      messages: the all-to-alls of MoE layers.
      copies: arrays that are copied whole, largest first.
      seconds, compute: of a replay, and at work in it.
      travelling, exposed: seconds of the messages, and those that compute waits for them.
    """

    computation: str
    messages: tuple[Collective, ...]
    copies: tuple[Copy, ...]
    seconds: float
    compute: float
    travelling: float
    exposed: float

    @property
    def hidden_share(self) -> float:
        return 1 - self.exposed / self.travelling


def costs(program: Program, rates: profile.Rates) -> dict[str, float]:
    """As `profile.costs`, on a rank in the middle whose messages fit their first round.

    The loops of unknown length in a tick are further rounds, and the model's end.
    """
    return profile.costs(program, rates, unknown_trips=0)


def read(program: Program, rates: profile.Rates) -> Pair:
    """The steady pair of ticks: the loop body with the most all-to-alls."""
    messages = [c for c in program.collectives if c.kind == "all-to-all"]
    bodies = [c.computation for c in messages if c.inside == "while"]
    body = max(bodies, key=bodies.count)
    timeline = profile.replay(program, costs(program, rates), body, unknown_trips=0)
    waits = [w for w in timeline.waits if w.collective.kind == "all-to-all"]
    return Pair(
        computation=body,
        messages=tuple(c for c in messages if c.computation == body),
        copies=tuple(c for c in program.copies if c.computation == body),
        seconds=timeline.total,
        compute=timeline.compute,
        travelling=sum(wait.seconds for wait in waits),
        exposed=sum(wait.exposed for wait in waits),
    )


def of_other_chunk(message: Collective, gemm: Gemm) -> bool:
    """Whether a GEMM is the backward chunk's and the message the forward's, or the reverse."""
    return {_chunk(message.op_name), _chunk(gemm.op_name)} == {FORWARD, BACKWARD}


def _chunk(op_name: str) -> str:
    """FORWARD or BACKWARD; empty for what is of neither."""
    return next((part for part in op_name.split("/") if part in (FORWARD, BACKWARD)), "")
