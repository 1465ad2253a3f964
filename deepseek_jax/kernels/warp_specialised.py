"""Warp-specialised, persistent Hopper kernels: what the FP8 products have in common.

A kernel has one thread block per SM that it may use. Three warpgroups of 128 threads share the
block: one producer starts copies from global to shared memory (TMA), two consumers multiply. They
meet in a ring of `stages` slots:

    producer                                     consumers
    wait until slot is empty                     wait until slot is full
    start copies into it, which make it full     multiply and sum
                                                 mark it empty

The steps of all tiles of a block run through the ring without a break: while consumers store a
tile, the producer already loads the next one.

Why no read meets a write of the same memory:

- Full: each copy arrives once on `full` and counts its bytes; a wait ends when all bytes are there.
- Empty: each thread of both consumers arrives on `empty`, after it has waited for its tensor core
  products. Scales are read by ordinary loads, which a fence orders before later copies.
- Pairs: a slot receives copies that either block of a cluster starts. Each producer therefore waits
  for its own consumers, then tells both blocks, and starts a copy when both have told. Both blocks
  take the same number of steps, because they work on the same rows.
- End: the producer takes `stages` more slots and leaves them unused. So neither block of a pair is
  gone while the other's copies or arrivals are under way.
- Store: a consumer writes shared memory with ordinary stores, makes them visible to TMA, and starts
  a copy. It reuses the buffer when the copy has read it.

JAX's interpreter runs the kernels in `tests/kernels/`: it checks indices, barriers, and the fences
between ordinary accesses and copies. `tests/aot/` compiles them for an H100. None has run on a GPU.
Nothing but the reasoning above stands for what the interpreter does not simulate: tensor core
products that are under way, copies that a block receives from its mate, and the end of a block.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels.matmul_tiling import PIECE, STEP, Tiling

PRODUCER = 2  # number of the warpgroup; 0 and 1 consume
E4M3 = jnp.float8_e4m3fn

# Rows of 128 bytes, and 8 rows to a group: the layout of shared memory that tensor cores read
# without bank conflicts.
_SWIZZLE = plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(STEP)

_TAKES_COST = "cost_estimate" in inspect.signature(plgpu.kernel).parameters


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots of shared memory between the producer and the consumers.

    Attributes:
      full, empty: a barrier of each slot.
      agreed: a barrier of each slot, between the producers of a pair; None without one.
      stages: slots.
    """

    full: Any
    empty: Any
    agreed: Any
    stages: int

    def acquire(self, step: jax.Array) -> jax.Array:
        """The slot of a step, once nobody reads it; for the producer."""
        slot = lax.rem(step, self.stages)

        @pl.when(step >= self.stages)
        def wait() -> None:
            plgpu.barrier_wait(self.empty.at[slot])
            if self.agreed is not None:
                plgpu.barrier_arrive(self.agreed.at[slot])
                plgpu.barrier_wait(self.agreed.at[slot])

        return slot

    def load(
        self, source: Any, target: Any, slot: jax.Array, collective_axes: str | None = None
    ) -> None:
        """Starts a copy into `target[slot]`."""
        plgpu.copy_gmem_to_smem(
            source, target.at[slot], self.full.at[slot], collective_axes=collective_axes
        )

    def take(self, step: jax.Array) -> jax.Array:
        """The slot of a step, once it is full; for a consumer."""
        slot = lax.rem(step, self.stages)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, slot: jax.Array) -> None:
        """Marks a slot empty; for a consumer that will not read it again."""
        plgpu.barrier_arrive(self.empty.at[slot])

    def drain(self, steps: jax.Array) -> None:
        """Ends the producer: returns when all slots of `steps` steps are empty, in both blocks."""

        def one(step: jax.Array, carry: None) -> None:
            self.acquire(step)
            return carry

        lax.fori_loop(steps, steps + self.stages, one, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """Work of a thread block, with the shared memory and barriers of `scratch`.

    Attributes:
      mate: number of this thread block in its pair.
    """

    tiling: Tiling
    mate: jax.Array
    staging: Any
    full: Any
    empty: Any
    agreed: Any = None

    @property
    def ring(self) -> Ring:
        """The slots of this kernel."""
        return Ring(self.full, self.empty, self.agreed, self.tiling.stages)


def scratch(tiling: Tiling, copies: int, out: Any) -> dict[str, Any]:
    """Shared memory and barriers that every kernel has, by name.

    Args:
      copies: copies that fill a slot.
      out: dtype of the result.
    """
    barriers: Any = dict(num_barriers=tiling.stages)
    itemsize = jnp.dtype(out).itemsize
    swizzle = plgpu.find_swizzle(tiling.store * itemsize * 8)
    layout = plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)
    shape = 2 * tiling.buffers, PIECE[0], tiling.store
    found = dict(
        staging=plgpu.SMEM(shape, out, transforms=layout),
        full=plgpu.Barrier(num_arrivals=copies, **barriers),
        empty=plgpu.Barrier(num_arrivals=2, **barriers),
    )
    if tiling.pair:
        found["agreed"] = plgpu.ClusterBarrier(
            collective_axes=("pair",), num_arrivals=1, **barriers
        )
    return found


def operand(tiling: Tiling, size: int) -> Any:
    """Shared memory of `size` rows of K in every slot."""
    return plgpu.SMEM((tiling.stages, size, STEP), E4M3, transforms=_SWIZZLE)


def run(
    tiling: Tiling,
    blocks: int,
    tiles: int,
    produce: Callable[[jax.Array, jax.Array], jax.Array],
    consume: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    ring: Ring,
) -> None:
    """Body of a kernel: gives each warpgroup its work, and each thread block its tiles.

    Args:
      blocks: thread blocks, or pairs of them.
      tiles: tiles, or pairs of them, in all.
      produce: (number of the tile, steps so far) -> steps so far.
      consume: (consumer, number of the tile, steps so far) -> steps so far.
    """
    warpgroup = lax.axis_index("warpgroup")
    block = lax.axis_index("sm")
    mine = lax.div(tiles - block + blocks - 1, blocks)

    def producer() -> None:
        plgpu.set_max_registers(tiling.producer_registers, action="decrease")
        steps = lax.fori_loop(
            0, mine, lambda i, steps: produce(block + i * blocks, steps), jnp.int32(0)
        )
        ring.drain(steps)

    def consumer() -> None:
        plgpu.set_max_registers(tiling.consumer_registers, action="increase")
        lax.fori_loop(
            0, mine, lambda i, steps: consume(warpgroup, block + i * blocks, steps), jnp.int32(0)
        )
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup == PRODUCER, producer, consumer)


def span(start: Any, size: int) -> Any:
    """Indices start, ..., start + size - 1, where start is a multiple of size."""
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, size), size)


def multiply(left: Any, right: Any, *, commit_reads: bool) -> jax.Array:
    """left right of two parts of shared memory, 64 x 128 and 128 x 128 in E4M3, in float32.

    An accumulator that is made just before its product starts from zero at no cost. The sum over
    128 values is that of the tensor cores; sums beyond are added outside, in float32 (3.3.2).

    Args:
      commit_reads: whether to order what ordinary loads have read from the slot, its scales, before
        the copies that will overwrite it. The tensor cores work in the meantime.
    """

    def product(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, left, right)
        if commit_reads:
            plgpu.commit_smem()
        return plgpu.wgmma_accumulator_load(accumulator)

    return pl.run_scoped(product, plgpu.ACC(PIECE, jnp.float32))


def store(
    tiling: Tiling, staging: Any, consumer: jax.Array, pieces: Sequence[jax.Array], place: Any
) -> None:
    """Copies a consumer's pieces, above one another, to global memory, `store` columns at a time.

    Args:
      staging: shared memory, `buffers` parts of each consumer.
      place: (first row, first column) in the consumer's part -> part of the result there.
    """
    parts = PIECE[1] // tiling.store
    for number, piece in enumerate(pieces):
        for part in range(parts):
            # All but the last copies have read their buffer, so the oldest one is free.
            plgpu.wait_smem_to_gmem(tiling.buffers - 1, wait_read_only=True)
            turn = (number * parts + part) % tiling.buffers
            buffer = staging.at[consumer * tiling.buffers + turn]
            column = part * tiling.store
            buffer[...] = piece[:, column : column + tiling.store].astype(buffer.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, place(number * PIECE[0], column))


def call(
    body: Callable[..., None],
    name: str,
    tiling: Tiling,
    blocks: int,
    out: jax.ShapeDtypeStruct,
    scratch_types: Mapping[str, Any],
    multiply_adds: int,
    interpret: Any,
) -> Callable[..., jax.Array]:
    """The kernel as a function of its operands.

    Args:
      name: of the kernel, also in compiled programs.
      blocks: thread blocks, or pairs of them: those that SMs are left for.
      multiply_adds: of the product, for XLA's scheduler. Before jax 0.12 only a profile of costs
        tells it (`aot/cost_model.py`).
    """
    body.__name__ = name

    def run(*operands: jax.Array) -> jax.Array:
        moved = sum(operand.nbytes for operand in operands) + out.size * out.dtype.itemsize
        cost = pl.CostEstimate(flops=2 * multiply_adds, transcendentals=0, bytes_accessed=moved)
        known: Any = {"cost_estimate": cost} if _TAKES_COST else {}
        kernel = plgpu.kernel(
            body,
            out_type=out,
            grid=(blocks,),
            grid_names=("sm",),
            cluster=(tiling.cluster,),
            cluster_names=("pair",),
            num_threads=3,
            thread_name="warpgroup",
            scratch_types=scratch_types,
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=0
            ),
            interpret=interpret,
            **known,
        )
        return kernel(*operands)

    return run
