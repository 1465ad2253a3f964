"""Executor of DualPipe and DualPipeV: one program for all ranks, driven by the tick tables.

A lockstep tick runs one forward and one backward chunk. They are independent, so that the messages
of each overlap with the matmuls of the other. Values wait between ticks in pools of slots, whose
number does not grow with the micro-batches. `lockstep.py` makes the tables, `model/overlapped` the
chunks. Runs inside a `shard_map` that is manual over `pipe`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.axes import PIPE
from deepseek_jax.parallel.overlap import Steps, interleave, run_to_end, storing, with_scope
from deepseek_jax.parallel.pipeline.lockstep import IDLE, BidirectionalStages
from deepseek_jax.parallel.pipeline.slot_pools import (
    SharedPools,
    accumulated,
    pool,
    read,
    run_if,
    run_work_if,
    write,
    zeros,
)

AXIS = PIPE
# Named scopes of the compiled program: ticks, the chunks in each, and the head and loss.
TICKS, FORWARD, BACKWARD, LAST = ("even", "odd"), "forward", "backward", "last"


class Stages(Protocol):
    """Interface of a model's stages to the executor.

    A micro-batch is a traced number; a chunk, one of the stages that a rank holds, is 0 or 1. Where
    `on` (a bool scalar) is false, a chunk may return anything finite, and should send nothing.
    """

    def first(self, micro: jax.Array) -> jax.Array:
        """Input of stage 0."""
        ...

    def forward(self, chunk: int, x: jax.Array, on: jax.Array) -> Steps[tuple[Any, Any, Any]]:
        """The output, the residuals that backward needs, and a pytree of sums to record.

        Residuals are a self-describing pytree, of which only the leaves are pooled: every trace
        must yield leaves of the same shapes in the same order, and the structure that `backward`
        gets may be that of another trace.
        """
        ...

    def backward(
        self, chunk: int, kept: Any, d_y: jax.Array, on: jax.Array
    ) -> Steps[tuple[jax.Array, Any, Any]]:
        """The gradients of the input and of the chunk's weights, these float32; and residuals, as
        of `forward`, for the gradients of weights that are left to `weight_backward`."""
        ...

    def weight_backward(self, chunk: int, later: Any) -> Any:
        """The gradients of weights that `backward` deferred."""
        ...

    def last(self, micro: jax.Array, y: jax.Array, total: Any) -> tuple[Any, jax.Array]:
        """`total` with the head's loss and gradients added, and the gradient of y."""
        ...

    def first_gradient(self, micro: jax.Array, d_x: jax.Array, total: Any) -> Any:
        """`total` with the gradients of `first` added."""
        ...


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Executor of one bidirectional schedule.

    Attributes:
      assignment: the stages of each rank.
      slots: pool -> number of its slots, from `TickTables`.
      turns: `interleave`'s program for the steps of a forward ("f") and a backward chunk ("b").
      skip: whether ticks outside of the steady ones skip the chunks that their rank has no
        micro-batch for, instead of computing and dropping them. A skipped tick overlaps nothing.
    """

    assignment: BidirectionalStages
    slots: dict[str, int]
    turns: Sequence[str]
    skip: bool

    def run(
        self,
        stages: Stages,
        like: jax.Array,
        total: Any,
        tables: dict[str, jax.Array],
        steady: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[list[Any], list[Any], Any]:
        """Runs all ticks.

        Args:
          like: array or ShapeDtypeStruct with the shape and dtype of the activations that pass
            between stages.
          total: zeros, to which `last` and `first_gradient` add.
          tables: name -> [T, ranks], of `TickTables`; idle ticks may follow the last one.
          steady: first steady tick, end of the steady ticks, and number of ticks; all even.

        Returns:
          Weight gradients of each chunk, summed statistics of each chunk, and `total`.
        """
        rank = lax.axis_index(PIPE)
        mine = {name: table[:, rank] for name, table in tables.items()}
        on = jnp.zeros((), jnp.bool_)
        blank = jnp.zeros(like.shape, like.dtype)
        forward_shapes = [
            jax.eval_shape(lambda x, on, c=c: run_to_end(stages.forward(c, x, on)), blank, on)
            for c in (0, 1)
        ]
        backward_shapes = [
            jax.eval_shape(
                lambda kept, d_y, on, c=c: run_to_end(stages.backward(c, kept, d_y, on)),
                forward_shapes[c][1], blank, on,
            )
            for c in (0, 1)
        ]  # fmt: skip
        kept = SharedPools.of([residuals for _, residuals, _ in forward_shapes])
        later = SharedPools.of([residuals for *_, residuals in backward_shapes])
        state = {
            "x": pool(like, self.slots["x"]),
            "d_y": pool(like, self.slots["d_y"]),
            "kept": kept.pools(self.slots["kept"]),
            "later": later.pools(self.slots.get("later", 0)),
            "sums": [zeros(sums) for *_, sums in forward_shapes],
            "gradients": [zeros(gradients) for _, gradients, _ in backward_shapes],
            "total": total,
        }
        tick = _Tick(self, stages, rank, forward_shapes, backward_shapes, kept, later)

        def loop(start: Any, end: Any, skip: bool, state: Any) -> Any:
            def pair(i: jax.Array, state: Any) -> Any:
                for parity in (0, 1):
                    now = {name: column[2 * i + parity] for name, column in mine.items()}
                    state = tick(state, now, parity, skip)
                return state

            return lax.fori_loop(start // 2, end // 2, pair, state)

        first, end, count = steady
        if self.skip:
            state = loop(0, first, True, state)
            state = loop(first, end, False, state)
            state = loop(end, count, True, state)
        else:
            state = loop(0, count, False, state)
        return state["gradients"], state["sums"], state["total"]


@dataclasses.dataclass(frozen=True)
class _Tick:
    """Lockstep tick of this rank.

    Attributes:
      forward_shapes, backward_shapes: shapes of each chunk's results, which `skip` fills with
        zeros.
      kept: pools of residuals from forward to backward.
      later: pools of residuals for deferred weight gradients.
    """

    pipeline: Pipeline
    stages: Stages
    rank: jax.Array
    forward_shapes: list[Any]
    backward_shapes: list[Any]
    kept: SharedPools
    later: SharedPools

    def __call__(self, state: Any, now: dict[str, jax.Array], parity: int, skip: bool) -> Any:
        """Runs a tick: all reads, both chunks, the exchange with the neighbour, all writes."""
        assignment, stages, f, b = self.pipeline.assignment, self.stages, parity, 1 - parity
        f_on, b_on = now["f_micro"] != IDLE, now["b_micro"] != IDLE
        reads = (
            read(state["x"], now["f_in"]),
            read(state["d_y"], now["b_in"]),
            self.kept.read(state["kept"], b, now["b_kept"]),
        )
        pools = state["x"], state["d_y"], state["kept"]
        # The barrier puts reads before all writes; otherwise XLA copies whole pools to be safe.
        (x, d_y, kept), (xs, d_ys, kepts) = lax.optimization_barrier((reads, pools))
        # Only even ticks begin the forward or backward of a micro-batch, and only odd ones end it.
        is_first = self._holds(0, 0)
        if parity == 0:
            x = run_if(is_first & f_on, lambda _: stages.first(now["f_micro"]), x)
        with jax.named_scope(TICKS[parity]):
            (y, new, sums), (d_x, made, missing) = self._both(f, b, x, d_y, kept, f_on, b_on, skip)
        swaps = assignment.swaps(parity)
        y_here, d_x_here = lax.ppermute((y, d_x), PIPE, swaps) if swaps else (y, d_x)
        total = state["total"]
        if parity == 1:
            ends = self._holds(assignment.stages - 1, 1) & f_on
            with jax.named_scope(LAST):
                total, d_top = run_if(
                    ends,
                    lambda both: stages.last(now["f_micro"], y, both[0]),
                    (total, jnp.zeros(y.shape, y.dtype)),
                )
            d_x_here = jnp.where(ends, d_top, d_x_here)
            total = run_if(
                is_first & b_on,
                lambda total: stages.first_gradient(now["b_micro"], d_x, total),
                total,
            )
        gradients = accumulated(state["gradients"], b, made, b_on)
        later = self.later.write(state["later"], b, now["w_to"], missing)
        if later:  # after the exchange: no neighbour waits for deferred weight gradients
            gradients = [self._rest(c, later, now, total) for c, total in enumerate(gradients)]
        return {
            "x": write(xs, now["y_to"], y_here),
            "d_y": write(d_ys, now["d_x_to"], d_x_here),
            "kept": self.kept.write(kepts, f, now["f_kept"], new),
            "sums": accumulated(state["sums"], f, sums, f_on),
            "gradients": gradients,
            "later": later,
            "total": total,
        }

    def _rest(self, chunk: int, later: Any, now: dict[str, jax.Array], total: Any) -> Any:
        """Weight gradients of a chunk, with those deferred to this tick added."""

        def add(total: Any) -> Any:
            with jax.named_scope(BACKWARD):
                taken = self.later.read(later, chunk, now["w_from"])
                more = self.stages.weight_backward(chunk, taken)
            return jax.tree.map(jnp.add, total, more)

        return run_if((now["w_micro"] != IDLE) & (now["w_chunk"] == chunk), add, total)

    def _holds(self, stage: int, chunk: int) -> jax.Array:
        """() bool: whether this rank holds `stage` as its chunk `chunk`."""
        assignment = self.pipeline.assignment
        holders = [r for r in range(assignment.ranks) if assignment.stage(r, chunk) == stage]
        return jnp.isin(self.rank, jnp.asarray(holders, jnp.int32))

    def _both(
        self, f: int, b: int, x: Any, d_y: Any, kept: Any, f_on: Any, b_on: Any, skip: bool
    ) -> tuple[Any, Any]:
        """Results of the forward and the backward chunk, interleaved unless `skip`."""
        forward = with_scope(FORWARD, self.stages.forward(f, x, f_on))
        backward = with_scope(BACKWARD, self.stages.backward(b, kept, d_y, b_on))
        if not skip:
            out: dict[str, Any] = {}
            works = {"f": storing(out, "f", forward), "b": storing(out, "b", backward)}
            interleave(works, self.pipeline.turns)
            return out["f"], out["b"]
        return (
            run_work_if(f_on, forward, self.forward_shapes[f]),
            run_work_if(b_on, backward, self.backward_shapes[b]),
        )
