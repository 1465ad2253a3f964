"""FP8 outer product on a Hopper GPU: the gradient of a linear layer's weight.

    out[e, k, n] = sum over b of s_x[b, k] s_y[b, n] sum over m in b of x[k, m] y[n, m]

K and N input and output width, E experts, b blocks of 128 tokens of expert e, m the tokens of a
block. x is the layer's input and y the gradient of its output, both in tiles of 128 tokens (section
3.3.2 of the report) and transposed, because tensor cores contract 8-bit operands along memory only.

An expert's tokens begin with a block and are padded to whole blocks with zeros: tiles of 128 tokens
need that copy anyway. An expert with no token takes no step, and its gradient is zero.

Both operands have a scale for each row, so a step needs a scale for each number of the result: the
product of the two, made while the tensor cores work. It takes as many registers as the product, so
a consumer has one piece, and tiles are 128 x 128.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels import warp_specialised
from deepseek_jax.kernels.kernel_names import OUTER
from deepseek_jax.kernels.matmul_tiling import PIECE, STEP, Tiling, position
from deepseek_jax.kernels.warp_specialised import span


@functools.partial(jax.jit, static_argnames=("tiling", "sms", "interpret"))
def outer(
    x: jax.Array,
    x_scales: jax.Array,
    y: jax.Array,
    y_scales: jax.Array,
    blocks: jax.Array | None = None,
    *,
    tiling: Tiling,
    sms: int,
    interpret: Any = None,
) -> jax.Array:
    """Sums over tokens of x y^T, for each expert.

    Args:
      x: KM float8_e4m3fn, tokens sorted by expert in whole blocks of 128; the tiling divides K.
      x_scales: (M/128)K float32.
      y: NM float8_e4m3fn; the tiling divides N.
      y_scales: (M/128)N float32.
      blocks: E int32, blocks of each expert; may be zero. Blocks past the last expert's are never
        read. None for one expert that has all.
      sms, interpret: as in `fp8_product.product`.

    Returns:
      EKN float32.

    Raises:
      ValueError: the tiling does not divide K and N, or 128 does not divide M.
    """
    tiling.check(x.shape[0], y.shape[0], x.shape[1])
    if blocks is None:
        table = jnp.asarray([[0, x.shape[1] // STEP]], jnp.int32)
    else:
        blocks = blocks.astype(jnp.int32)
        table = jnp.stack([jnp.cumsum(blocks) - blocks, blocks], 1)
    out = jax.ShapeDtypeStruct((table.shape[0], x.shape[0], y.shape[0]), jnp.float32)
    scratch = warp_specialised.scratch(tiling, copies=4, out=jnp.float32) | dict(
        x_smem=warp_specialised.operand(tiling, tiling.height),
        x_scale_smem=plgpu.SMEM((tiling.stages, tiling.height), jnp.float32),
        y_smem=warp_specialised.operand(tiling, tiling.width),
        y_scale_smem=plgpu.SMEM((tiling.stages, tiling.width), jnp.float32),
    )

    def body(*refs: Any, **scratch: Any) -> None:
        fields = ("table", "x", "x_scales", "y", "y_scales", "out")
        given = dict(zip(fields, refs, strict=True)) | scratch
        _Outer(tiling=tiling, mate=lax.axis_index("pair"), **given).run(tiling.blocks(sms))

    multiply_adds = x.size * y.shape[0]
    return warp_specialised.call(
        body, OUTER, tiling, tiling.blocks(sms), out, scratch, multiply_adds, interpret
    )(table, x, x_scales, y, y_scales)


@dataclasses.dataclass(frozen=True)
class _Outer(warp_specialised.Kernel):
    """The kernel: references to global memory, then to shared memory.

    Attributes:
      table: E2, first block of tokens of each expert, and the number of them.
    """

    table: Any
    x: Any
    x_scales: Any
    y: Any
    y_scales: Any
    out: Any
    x_smem: Any
    x_scale_smem: Any
    y_smem: Any
    y_scale_smem: Any

    def run(self, blocks: int) -> None:
        """Computes this thread block's tiles."""
        down, across = self._tiles()
        tiles = self.out.shape[0] * down * across
        warp_specialised.run(self.tiling, blocks, tiles, self.produce, self.consume, self.ring)

    def produce(self, number: jax.Array, before: jax.Array) -> jax.Array:
        """Loads the operands of a tile, one block of tokens after another."""
        expert, row, column = self._corner(number)
        first, count = self.table[expert, 0], self.table[expert, 1]
        mine, theirs = pl.ds(row, self.tiling.height), pl.ds(column, self.tiling.width)

        def step(j: jax.Array, carry: None) -> None:
            slot, b = self.ring.acquire(before + j), first + j
            tokens = pl.ds(b * STEP, STEP)
            pair = "pair" if self.tiling.pair else None
            self.ring.load(self.x.at[mine, tokens], self.x_smem, slot, collective_axes=pair)
            self.ring.load(self.x_scales.at[b, mine], self.x_scale_smem, slot)
            self.ring.load(self.y.at[theirs, tokens], self.y_smem, slot)
            self.ring.load(self.y_scales.at[b, theirs], self.y_scale_smem, slot)
            return carry

        lax.fori_loop(0, count, step, None)
        return before + count

    def consume(self, consumer: jax.Array, number: jax.Array, before: jax.Array) -> jax.Array:
        """Computes a consumer's half of a tile, and stores it."""
        down, right = consumer * PIECE[0], 0
        rows, columns = span(down, PIECE[0]), span(right, PIECE[1])

        def step(j: jax.Array, total: jax.Array) -> jax.Array:
            slot = self.ring.take(before + j)
            s_x = lax.broadcast_in_dim(self.x_scale_smem[slot, rows], PIECE, [0])
            s_y = lax.broadcast_in_dim(self.y_scale_smem[slot, columns], PIECE, [1])
            scale = s_x * s_y
            part = warp_specialised.multiply(
                self.x_smem.at[slot, rows, :],
                self.y_smem.at[slot, columns, :].T,
                commit_reads=True,
            )
            self.ring.release(slot)
            return total + part * scale

        count = self.table[self._corner(number)[0], 1]
        total = lax.fori_loop(0, count, step, jnp.zeros(PIECE, jnp.float32))

        # Computed again, because what lives through the loop holds registers.
        expert, row, column = self._corner(number)

        def place(r: int, c: int) -> Any:
            rows = pl.ds(row + down + r, PIECE[0])
            return self.out.at[expert, rows, pl.ds(column + right + c, self.tiling.store)]

        warp_specialised.store(self.tiling, self.staging, consumer, [total], place)
        return before + self.table[expert, 1]

    def _tiles(self) -> tuple[int, int]:
        """Tiles, or pairs of them, of one expert: down and across."""
        _, down, across = self.out.shape
        return down // self.tiling.height, across // (self.tiling.width * self.tiling.cluster)

    def _corner(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Expert of a tile, its first row, and its first column."""
        down, across = self._tiles()
        expert = lax.div(number, jnp.int32(down * across))
        inside = number - expert * (down * across)
        row, column = position(inside, down, across, self.tiling.band)
        column = column * self.tiling.cluster + self.mate
        return expert, row * self.tiling.height, column * self.tiling.width
