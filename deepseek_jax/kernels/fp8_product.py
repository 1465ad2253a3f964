"""FP8 product on a Hopper GPU: a linear layer's forward pass and the gradient of its input.

    out[m, n] = sum over b of s_x[b, m] s_w[e, n/128, b] sum over k in b of x[m, k] w[e, n, k]

M rows, N columns, K contracted, b blocks of 128 of K, e the expert of row m: the tensor cores sum
within a block of K, and a float32 sum outside them takes up one block after another (section 3.3.2
of the report). Both operands are E4M3 and contiguous along K, the only order that tensor cores take
for 8 bits.

    forward          x = x MK,        w = W^T: a copy of the weight [in, out] that is transposed
    input gradient   x = d_out MN,    w = W as it is; its columns are contracted

The scales of x come transposed, (K/128)M, so that those of a tile and a step are one contiguous
copy. The block scale of the weight is one number for a consumer and a step.

Experts: a tile whose rows belong to several experts multiplies them by the weight of each. It takes
a row's scale as zero for all experts but the row's own. A NaN in the weight of one expert therefore
reaches rows of the others in the same tile. Rows of nobody become zero at the end.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from deepseek_jax.kernels import warp_specialised
from deepseek_jax.kernels.kernel_names import PRODUCT
from deepseek_jax.kernels.matmul_tiling import PIECE, STEP, Tiling, position
from deepseek_jax.kernels.row_blocks import RowBlocks, one_expert, row_blocks
from deepseek_jax.kernels.warp_specialised import span


@functools.partial(jax.jit, static_argnames=("dtype", "tiling", "sms", "interpret"))
def product(
    x: jax.Array,
    x_scales: jax.Array,
    weights: jax.Array,
    weight_scales: jax.Array,
    sizes: jax.Array | None = None,
    *,
    dtype: DTypeLike,
    tiling: Tiling,
    sms: int,
    interpret: Any = None,
) -> jax.Array:
    """Product x weights[expert of each row]^T of scaled E4M3 operands.

    Args:
      x: MK float8_e4m3fn, sorted by expert; the tiling divides M and N, and 128 divides K.
      x_scales: (K/128)M float32.
      weights: ENK float8_e4m3fn.
      weight_scales: E(N/128)(K/128) float32.
      sizes: E int32, rows of each expert; may be zero. None for one expert that has all rows.
      dtype: of the result.
      sms: SMs that the kernel may use.
      interpret: parameters of Pallas's interpreter, which runs on any platform; None for a GPU.

    Returns:
      MN, summed in float32, rounded once; rows past sum(sizes) are zero.

    Raises:
      ValueError: the tiling does not divide M and N, or 128 does not divide K.
    """
    rows = x.shape[0]
    tiling.check(rows, weights.shape[1], x.shape[1])
    if sizes is None:
        table = one_expert(rows, tiling.height)
    else:
        table = row_blocks(sizes, rows, tiling.height)
    out = jax.ShapeDtypeStruct((rows, weights.shape[1]), dtype)
    scratch = warp_specialised.scratch(tiling, copies=3, out=dtype) | dict(
        x_smem=warp_specialised.operand(tiling, tiling.height),
        scale_smem=plgpu.SMEM((tiling.stages, tiling.height), jnp.float32),
        weight_smem=warp_specialised.operand(tiling, tiling.width),
    )

    def body(visits: Any, experts: Any, *refs: Any, **scratch: Any) -> None:
        fields = ("x", "x_scales", "weights", "weight_scales", "out")
        given = dict(zip(fields, refs, strict=True)) | scratch
        mate, tables = lax.axis_index("pair"), RowBlocks(visits, experts)
        _Product(tiling=tiling, mate=mate, tables=tables, **given).run(tiling.blocks(sms))

    multiply_adds = x.size * weights.shape[1]
    return warp_specialised.call(
        body, PRODUCT, tiling, tiling.blocks(sms), out, scratch, multiply_adds, interpret
    )(*table, x, x_scales, weights, weight_scales)


@dataclasses.dataclass(frozen=True)
class _Visit:
    """Rows first, ..., end - 1 of an expert; those of a tile that are among them."""

    expert: Any
    first: Any
    end: Any


@dataclasses.dataclass(frozen=True)
class _Product(warp_specialised.Kernel):
    """The kernel: references to global memory, then to shared memory."""

    tables: RowBlocks
    x: Any
    x_scales: Any
    weights: Any
    weight_scales: Any
    out: Any
    x_smem: Any
    scale_smem: Any
    weight_smem: Any

    def run(self, blocks: int) -> None:
        """Computes this thread block's tiles."""
        down, across = self._tiles()
        warp_specialised.run(
            self.tiling, blocks, down * across, self.produce, self.consume, self.ring
        )

    def produce(self, number: jax.Array, before: jax.Array) -> jax.Array:
        """Loads the operands of a tile, one visit after another."""
        block, row, column = self._corner(number)
        first, steps = self._visits(block)
        mine, theirs = pl.ds(row, self.tiling.height), pl.ds(column, self.tiling.width)

        def step(j: jax.Array, carry: None) -> None:
            visit, b = self._visit(first, j)
            slot, depth = self.ring.acquire(before + j), pl.ds(b * STEP, STEP)
            pair = "pair" if self.tiling.pair else None
            self.ring.load(self.x.at[mine, depth], self.x_smem, slot, collective_axes=pair)
            self.ring.load(self.x_scales.at[b, mine], self.scale_smem, slot)
            self.ring.load(self.weights.at[visit.expert, theirs, depth], self.weight_smem, slot)
            return carry

        lax.fori_loop(0, steps, step, None)
        return before + steps

    def consume(self, consumer: jax.Array, number: jax.Array, before: jax.Array) -> jax.Array:
        """Computes a consumer's half of a tile, and stores it."""
        block, _, _ = self._corner(number)
        first, steps = self._visits(block)
        step = functools.partial(self._add_step, consumer, number, before, first)
        zero = (jnp.zeros(PIECE, jnp.float32),) * (self.tiling.part[0] // PIECE[0])
        totals = lax.fori_loop(0, steps, step, zero)

        # Computed again, because what lives through the loop holds registers.
        block, row, column = self._corner(number)
        down, right = self._half(consumer)
        first, steps = self._visits(block)
        end = self._visit(first, jnp.maximum(steps - 1, 0))[0].end
        totals = [
            jnp.where(_rows(row + down + i * PIECE[0], PIECE) < end, total, 0.0)
            for i, total in enumerate(totals)
        ]

        def place(r: int, c: int) -> Any:
            rows = pl.ds(row + down + r, PIECE[0])
            return self.out.at[rows, pl.ds(column + right + c, self.tiling.store)]

        warp_specialised.store(self.tiling, self.staging, consumer, totals, place)
        return before + steps

    def _add_step(
        self,
        consumer: jax.Array,
        number: jax.Array,
        before: jax.Array,
        first: jax.Array,
        j: jax.Array,
        totals: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, ...]:
        """Sums with the products of one step."""
        _, row, column = self._corner(number)
        down, right = self._half(consumer)
        visit, b = self._visit(first, j)
        s_w = self.weight_scales[visit.expert, lax.div(column + right, STEP), b]
        slot = self.ring.take(before + j)
        weight = self.weight_smem.at[slot, span(right, PIECE[1]), :].T
        sums = []
        for i, total in enumerate(totals):
            last, rows = i == len(totals) - 1, span(down + i * PIECE[0], PIECE[0])
            s_x = self.scale_smem[slot, rows]
            m = _rows(row + down + i * PIECE[0], PIECE[:1])
            own = (m >= visit.first) & (m < visit.end)
            scale = lax.broadcast_in_dim(jnp.where(own, s_x * s_w, 0.0), PIECE, [0])
            x = self.x_smem.at[slot, rows, :]
            part = warp_specialised.multiply(x, weight, commit_reads=last)
            if last:
                self.ring.release(slot)
            sums.append(total + part * scale)
        return tuple(sums)

    def _tiles(self) -> tuple[int, int]:
        """Blocks of rows, and tiles, or pairs of them, along the columns."""
        down, across = self.out.shape[0] // self.tiling.height, self.out.shape[1]
        return down, across // (self.tiling.width * self.tiling.cluster)

    def _corner(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Block of rows of a tile, its first row, and its first column."""
        block, column = position(number, *self._tiles(), self.tiling.band)
        column = column * self.tiling.cluster + self.mate
        return block, block * self.tiling.height, column * self.tiling.width

    def _half(self, consumer: jax.Array) -> tuple[Any, Any]:
        """First row and column of a consumer, in its tile."""
        rows, columns = self.tiling.part
        return (consumer * rows, 0) if self.tiling.halves == "rows" else (0, consumer * columns)

    def _visits(self, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First visit of a block of rows, and the steps of all of its visits."""
        count = self.tables.visits[block, 1]
        return self.tables.visits[block, 0], count * (self.x.shape[1] // STEP)

    def _visit(self, first: jax.Array, j: jax.Array) -> tuple[_Visit, jax.Array]:
        """The visit that step j of a block belongs to, and the step's block of K."""
        steps = self.x.shape[1] // STEP
        which = lax.div(j, steps)
        expert = [self.tables.experts[first + which, i] for i in range(3)]
        return _Visit(*expert), j - which * steps


def _rows(first: Any, shape: tuple[int, ...]) -> jax.Array:
    """Numbers of rows, counted along the first axis."""
    return first + lax.broadcasted_iota(jnp.int32, shape, 0)
