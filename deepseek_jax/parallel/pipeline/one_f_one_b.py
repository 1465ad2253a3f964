"""1F1B, plain: a rank's tick is one forward chunk and then one backward, and nothing overlaps.

With what `executor.py` does to compare. Rank r holds stage r. In tick t it runs

    forward    micro-batch t - r
    backward   micro-batch t - (2 * (ranks - 1) - r), on the last rank that of the tick's forward

so what a tick sends is what the neighbour's next tick begins with, and formulas do for tables.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.overlap import Steps, run_to_end, with_scope
from deepseek_jax.parallel.pipeline.executor import AXIS, BACKWARD, FORWARD, Stages
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
    """Who holds which stage: every rank one, in order."""

    ranks: int
    chunks: ClassVar[int] = 1

    @property
    def stages(self) -> int:
        return self.ranks

    def stage(self, rank: int, chunk: int) -> int:
        return rank


@dataclasses.dataclass(frozen=True)
class OneFOneB:
    """Attributes:
    ranks: all along `pipe`.
    skip: whether a rank leaves out what it has not to do, instead of making and dropping it.
    """

    ranks: int
    skip: bool

    @property
    def slots(self) -> int:
        """Micro-batches that the first rank holds at once; asynchronous ranks need half of them."""
        return 2 * self.ranks - 1

    def ticks(self, count: Any) -> Any:
        """How many for `count` micro-batches: the last one goes down the ranks and comes back."""
        return count + 2 * (self.ranks - 1)

    def run(
        self, stages: Stages, like: jax.Array, total: Any, count: jax.Array
    ) -> tuple[list[Any], list[Any], Any]:
        """All ticks.

        Args:
          like: shape and dtype of what travels between stages.
          total: zeros of what `last` and `first_gradient` add to.
          count: micro-batches, any number.

        Returns:
          As `Pipeline.run`, of one chunk.
        """
        rank, on = lax.axis_index(AXIS), jnp.zeros((), jnp.bool_)
        wait = jnp.zeros(like.shape, like.dtype)
        whole = jax.eval_shape(lambda x: run_to_end(stages.forward(0, x, on)), wait)
        back = jax.eval_shape(
            lambda kept, d_y: run_to_end(stages.backward(0, kept, d_y, on)), whole[1], wait
        )
        pools = SharedPools.of([whole[1]])
        is_first, is_last = rank == 0, rank == self.ranks - 1
        down = [(r, r + 1) for r in range(self.ranks - 1)]
        up = [(r + 1, r) for r in range(self.ranks - 1)]

        def tick(t: jax.Array, state: Any) -> Any:
            x, d_y, kept, gradients, sums, total = state
            f, b = t - rank, t - (2 * (self.ranks - 1) - rank)
            f_on, b_on = (f >= 0) & (f < count), (b >= 0) & (b < count)
            f_micro, b_micro = jnp.where(f_on, f, IDLE), jnp.where(b_on, b, IDLE)
            x = run_if(is_first & f_on, lambda _: stages.first(f_micro), x)
            y, new, more = self._do(f_on, with_scope(FORWARD, stages.forward(0, x, f_on)), whole)
            kept = pools.write(kept, 0, f % self.slots, new)
            sums = accumulated(sums, 0, more, f_on)
            total, d_top = run_if(
                is_last & f_on, lambda both: stages.last(f_micro, y, both[0]), (total, wait)
            )
            d_y = jnp.where(is_last, d_top, d_y)
            # After the write: the last rank's backward is that of this tick's forward.
            held = pools.read(kept, 0, b % self.slots)
            backward = with_scope(BACKWARD, stages.backward(0, held, d_y, b_on))
            d_x, each, _ = self._do(b_on, backward, back)  # nothing is left for later
            gradients = accumulated(gradients, 0, each, b_on)
            total = run_if(
                is_first & b_on, lambda total: stages.first_gradient(b_micro, d_x, total), total
            )
            y, d_x = lax.ppermute(y, AXIS, down), lax.ppermute(d_x, AXIS, up)
            return y, d_x, kept, gradients, sums, total

        start = (wait, wait, pools.pools(self.slots), [zeros(back[1])], [zeros(whole[2])], total)
        *_, gradients, sums, total = lax.fori_loop(0, self.ticks(count), tick, start)
        return gradients, sums, total

    def _do(self, on: jax.Array, work: Steps[Any], shapes: Any) -> Any:
        if not self.skip:
            return run_to_end(work)
        return run_work_if(on, work, shapes)
