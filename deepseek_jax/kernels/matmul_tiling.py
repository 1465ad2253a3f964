"""Tilings of the FP8 matmul kernels for Hopper: what a thread block computes at a time.

M rows, N columns of the result, K contracted, E experts.

A tile of the result takes K / 128 steps. A step loads 128 values of K for each of the tile's rows
and columns: that is one scale of section 3.3.2 of the report, and 128 bytes, the widest swizzle of
shared memory. Two warpgroups, the consumers, each compute half of the tile in pieces of 64 x 128.
A piece is one accumulator of the tensor cores: 64 registers of each thread, beside 64 for its sum.

The choice of a tiling for a shape is estimated, not measured. It weighs three numbers: tiles that
the last round leaves idle, cycles of the tensor cores, and bytes that come from L2.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

STEP = 128  # values of K in a step
PIECE = (64, 128)  # rows and columns of one accumulator
H100_SMS = 132
# Registers of a thread: 65,536 over 3 warpgroups, rounded down to a multiple of 8 at launch. The
# warpgroup that loads gives its share up, and the consumers take what it leaves.
_REGISTERS = 3 * 168

# Multiply-adds of a clock in one SM (FP8 peak over SMs and clock), and bytes that L2 delivers in a
# clock to one SM when all ask (commonly cited 5,120 for all; not measured here).
_MACS_PER_CLOCK = 4096
_L2_BYTES_PER_CLOCK = 5120 / H100_SMS


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of a tile, and how a thread block is fed.

    Attributes:
      height, width: rows and columns of a tile.
      halves: the side that the two consumers divide.
      stages: steps of operands in shared memory at once.
      store: columns of a piece that leave for global memory at once.
      buffers: such parts on their way, of each consumer.
      band: tiles above one another that run at the same time, to read the same columns from L2.
      pair: whether two thread blocks, a cluster, compute neighbouring columns and load each one
        half of their common rows for both (multicast).
      producer_registers: of a thread that loads.
    """

    height: int = 128
    width: int = 256
    halves: Literal["rows", "columns"] = "columns"
    stages: int = 4
    store: int = 32
    buffers: int = 2
    band: int = 8
    pair: bool = False
    producer_registers: int = 56

    def __str__(self) -> str:
        return f"{self.height}x{self.width}{' in pairs' if self.pair else ''}"

    @property
    def part(self) -> tuple[int, int]:
        """Rows and columns of one consumer: pieces above one another."""
        if self.halves == "rows":
            return self.height // 2, self.width
        return self.height, self.width // 2

    @property
    def consumer_registers(self) -> int:
        """Registers of a thread that computes."""
        return (_REGISTERS - self.producer_registers) // 2 // 8 * 8

    @property
    def cluster(self) -> int:
        """Thread blocks that share loads."""
        return 2 if self.pair else 1

    def blocks(self, sms: int) -> int:
        """Thread blocks, or pairs of them, that run at once on so many SMs."""
        return max(sms // self.cluster, 1)

    def step_cycles(self) -> float:
        """Estimated clocks of a step, if every SM runs this tiling."""
        tensor = self.height * self.width * STEP / _MACS_PER_CLOCK
        loaded = (self.height / self.cluster + self.width) * STEP
        return max(tensor, loaded / _L2_BYTES_PER_CLOCK)

    def cycles(self, shape: tuple[int, int, int], experts: int, sms: int) -> float:
        """Estimated clocks of a product of `shape` M, N, K, whose rows belong to E experts.

        Tiles are dealt out to SMs in rounds; an expert that ends inside a tile adds a tile.
        """
        rows, columns, depth = shape
        tiles = (-(-rows // self.height) + experts - 1) * (columns // self.width)
        rounds = math.ceil(tiles / (sms // self.cluster * self.cluster))
        return rounds * -(-depth // STEP) * self.step_cycles()

    def fits(self, rows: int, columns: int) -> bool:
        """Whether tiles, or pairs of them, fill a result of that size."""
        return rows % self.height == 0 and columns % (self.width * self.cluster) == 0

    def check(self, rows: int, columns: int, depth: int) -> None:
        """Raises ValueError if a kernel with this tiling cannot compute a product M, N, K."""
        if not self.fits(rows, columns) or depth % STEP:
            raise ValueError(
                f"a kernel in tiles of {self} cannot compute {rows} x {columns} x {depth}; pad all "
                f"three to multiples of {STEP}, and take a tiling from `choose`"
            )


def choose(
    candidates: Iterable[Tiling], shape: tuple[int, int, int], experts: int, sms: int
) -> Tiling:
    """The candidate with the fewest estimated clocks for a shape M, N, K.

    Raises:
      ValueError: no candidate fits; M and N must be multiples of 128.
    """
    rows, columns, _ = shape
    fitting = [tiling for tiling in candidates if tiling.fits(rows, columns)]
    if not fitting:
        raise ValueError(f"no tiling fits {rows} x {columns}; pad both to multiples of {STEP}")
    return min(fitting, key=lambda tiling: tiling.cycles(shape, experts, sms))


def position(number: Any, down: int, across: int, band: int) -> tuple[Any, Any]:
    """Row and column of a tile, in tiles: down a band of rows first, then one column on.

    Tiles that run at the same time have near numbers. A band of `band` rows keeps them near a
    square, so that each row and column of operands is read from L2 more often than from memory.
    """
    first = lax.div(number, jnp.int32(band * across)) * band
    inside = lax.rem(number, jnp.int32(band * across))
    height = jnp.clip(down - first, 1, band)
    return first + lax.rem(inside, height), lax.div(inside, height)


# The larger a tile, the fewer bytes it loads for a multiply-add. Where the result is small, or its
# sides are no multiples of 256, smaller tiles leave fewer SMs idle. Registers are those with which
# ptxas spills nothing; neither more nor fewer of them are better (`tests/aot/test_fp8_kernels.py`).
WIDE = Tiling()
TALL = Tiling(256, 128, "rows")
SQUARE = Tiling(128, 128, "rows", stages=6)
OUTER = Tiling(128, 128, "rows", stages=5, producer_registers=40)
PRODUCT_TILINGS = tuple(
    dataclasses.replace(tiling, pair=pair)
    for tiling in (WIDE, TALL, SQUARE)
    for pair in (False, True)
)
OUTER_TILINGS = (OUTER, dataclasses.replace(OUTER, pair=True))
