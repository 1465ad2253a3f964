"""1F1B in lockstep: each tick of a rank is one forward and then one backward chunk, not overlapped.

The baseline of `executor.py`. Rank r holds stage r. In tick t it runs

    forward    micro-batch t - r
    backward   micro-batch t - (2 * (ranks - 1) - r); on the last rank that of the tick's forward

The results of a tick are the inputs of the neighbour's next tick, so these formulas replace tables.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.axes import PIPE
from deepseek_jax.parallel.overlap import Steps, run_to_end, with_scope
from deepseek_jax.parallel.pipeline.executor import BACKWARD, FORWARD, Stages
from deepseek_jax.parallel.pipeline.lockstep import IDLE
from deepseek_jax.parallel.pipeline.slot_pools import (
    SharedPools,
    accumulated,
    run_if,
    run_work_if,
    zeros,
)


@dataclasses.dataclass(frozen=True)
class LinearStages:
    """Stages of 1F1B: rank r holds stage r."""

    ranks: int
    chunks: ClassVar[int] = 1  # stages per rank

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self.ranks

    def stage(self, rank: int, chunk: int) -> int:
        """Stage that a rank holds as its chunk `chunk`."""
        return rank


@dataclasses.dataclass(frozen=True)
class OneFOneB:
    """Executor of 1F1B.

    Attributes:
      ranks: ranks along `pipe`.
      skip: whether a rank skips chunks that it has no micro-batch for, instead of computing and
        dropping them.
    """

    ranks: int
    skip: bool

    @property
    def slots(self) -> int:
        """Micro-batches live on the first rank; without lockstep they would be `ranks`."""
        return 2 * self.ranks - 1

    def ticks(self, count: Any) -> Any:
        """Number of ticks for `count` micro-batches, an int or a traced scalar."""
        return count + 2 * (self.ranks - 1)

    def run(
        self, stages: Stages, like: jax.Array, total: Any, count: jax.Array
    ) -> tuple[list[Any], list[Any], Any]:
        """Runs all ticks.

        Args:
          like: array or ShapeDtypeStruct with the shape and dtype of the activations that pass
            between stages.
          total: zeros, to which `last` and `first_gradient` add.
          count: () int, number of micro-batches.

        Returns:
          Results as of `Pipeline.run`, for one chunk.
        """
        rank, on = lax.axis_index(PIPE), jnp.zeros((), jnp.bool_)
        blank = jnp.zeros(like.shape, like.dtype)
        forward_shapes = jax.eval_shape(lambda x: run_to_end(stages.forward(0, x, on)), blank)
        backward_shapes = jax.eval_shape(
            lambda kept, d_y: run_to_end(stages.backward(0, kept, d_y, on)),
            forward_shapes[1], blank,
        )  # fmt: skip
        pools = SharedPools.of([forward_shapes[1]])
        is_first, is_last = rank == 0, rank == self.ranks - 1
        down = [(r, r + 1) for r in range(self.ranks - 1)]
        up = [(r + 1, r) for r in range(self.ranks - 1)]

        def tick(t: jax.Array, state: Any) -> Any:
            x, d_y, kept, gradients, sums, total = state
            f, b = t - rank, t - (2 * (self.ranks - 1) - rank)
            f_on, b_on = (f >= 0) & (f < count), (b >= 0) & (b < count)
            f_micro, b_micro = jnp.where(f_on, f, IDLE), jnp.where(b_on, b, IDLE)
            x = run_if(is_first & f_on, lambda _: stages.first(f_micro), x)
            forward = with_scope(FORWARD, stages.forward(0, x, f_on))
            y, new, more = self._do(f_on, forward, forward_shapes)
            kept = pools.write(kept, 0, f % self.slots, new)
            sums = accumulated(sums, 0, more, f_on)
            total, d_top = run_if(
                is_last & f_on, lambda both: stages.last(f_micro, y, both[0]), (total, blank)
            )
            d_y = jnp.where(is_last, d_top, d_y)
            # Read after the write: the last rank's backward is of this tick's forward.
            held = pools.read(kept, 0, b % self.slots)
            backward = with_scope(BACKWARD, stages.backward(0, held, d_y, b_on))
            # No weight gradients are deferred.
            d_x, each, _ = self._do(b_on, backward, backward_shapes)
            gradients = accumulated(gradients, 0, each, b_on)
            total = run_if(
                is_first & b_on, lambda total: stages.first_gradient(b_micro, d_x, total), total
            )
            y, d_x = lax.ppermute(y, PIPE, down), lax.ppermute(d_x, PIPE, up)
            return y, d_x, kept, gradients, sums, total

        gradients, sums = [zeros(backward_shapes[1])], [zeros(forward_shapes[2])]
        start = (blank, blank, pools.pools(self.slots), gradients, sums, total)
        *_, gradients, sums, total = lax.fori_loop(0, self.ticks(count), tick, start)
        return gradients, sums, total

    def _do(self, on: jax.Array, work: Steps[Any], shapes: Any) -> Any:
        """Result of a chunk; with `skip`, zeros where `on` is false."""
        if not self.skip:
            return run_to_end(work)
        return run_work_if(on, work, shapes)
