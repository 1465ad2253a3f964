"""Quantisation of weights on a Hopper GPU, in one reading (section 3.3.2 of the report).

    s[i, j] = power of two >= max over block i, j of |w| / 448      q = w / s in E4M3

A block is 128 x 128. The forward product contracts the input width of a weight, and the gradient of
its input the output width, each along memory: so they need the values and a transposed copy of
them, which one thread block makes of its block of the float32 master. Structure and bits are those
of `fp8_quantise.py`; not run on a GPU yet.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels import fp8_quantise
from deepseek_jax.kernels.fp8_quantise import E4M3, PART, SQUARE

_COPIES = 4  # of a scale: the least that a copy to global memory takes


def quantise_blocks(
    weights: jax.Array, *, transposed: bool, largest: float, floor: float, interpret: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Blocks nearest to weights, with power-of-two scales.

    Args:
      weights: EKN float32; 128 divides K and N.
      transposed: whether to return the transposed copy.
      largest, floor, interpret: as in `fp8_quantise.quantise`.

    Returns:
      EKN float8_e4m3fn; scales E(K/128)(N/128) float32; ENK float8_e4m3fn, or None.

    Raises:
      ValueError: other sizes.
    """
    experts, height, width = weights.shape
    if height % SQUARE or width % SQUARE:
        raise ValueError(
            f"{height} x {width} is not in blocks of {SQUARE} x {SQUARE}; pad it with zeros"
        )
    down, across = height // SQUARE, width // SQUARE
    scratch = dict(
        weight=fp8_quantise.square_memory(jnp.float32),
        lines=plgpu.SMEM((SQUARE,), jnp.float32),
        scale=plgpu.SMEM((SQUARE,), jnp.float32),
        values=fp8_quantise.square_memory(E4M3),
        full=plgpu.Barrier(),
        turn=plgpu.Barrier(num_arrivals=2),
    )
    out = [jax.ShapeDtypeStruct(weights.shape, E4M3)]
    out += [jax.ShapeDtypeStruct((experts, down, across, _COPIES), jnp.float32)]
    if transposed:
        scratch["turned"] = fp8_quantise.square_memory(E4M3)
        out += [jax.ShapeDtypeStruct((experts, width, height), E4M3)]

    def body(source: Any, *results: Any, **memory: Any) -> None:
        number = lax.axis_index("row")
        expert = lax.div(number, jnp.int32(down))
        block = _Block(expert, number - expert * down, largest, floor, interpret is None, memory)
        block.run(source, *results)

    found = fp8_quantise.call(body, out, (experts * down, across), scratch, interpret)(weights)
    return found[0], found[1][..., 0], found[2] if transposed else None


@dataclasses.dataclass(frozen=True)
class _Block:
    """Work of a warpgroup, with the shared memory and barriers of its thread block, by name."""

    expert: jax.Array
    row: jax.Array
    largest: float
    floor: float
    on_gpu: bool
    memory: dict[str, Any]

    def run(self, source: Any, values: Any, scales: Any, turned: Any = None) -> None:
        """Quantises a block: half of its rows, then half of its columns."""
        row, column = self.row, lax.axis_index("column")
        half = lax.axis_index("half")
        own = pl.ds(pl.multiple_of(half * PART, PART), PART)
        block = tuple(pl.ds(number * SQUARE, SQUARE) for number in (row, column))
        weight = self.memory["weight"]

        @pl.when(half == 0)
        def start() -> None:
            plgpu.copy_gmem_to_smem(source.at[self.expert, *block], weight, self.memory["full"])

        plgpu.barrier_wait(self.memory["full"])
        x = self._pairs(weight[own, :])
        scale, inverse = self._scale(x, own)
        self.memory["values"][own, :] = fp8_quantise.scaled(x, inverse)
        self.memory["scale"][own] = scale
        if turned is not None:
            x = fp8_quantise.read_transposed(weight, own, self.on_gpu)
            self.memory["turned"][own, :] = fp8_quantise.scaled(x, inverse)
        plgpu.commit_smem()
        down, across = (pl.ds(number * SQUARE + half * PART, PART) for number in (row, column))
        place = values.at[self.expert, down, block[1]]
        plgpu.copy_smem_to_gmem(self.memory["values"].at[own], place)
        if turned is not None:
            place = turned.at[self.expert, across, block[0]]
            plgpu.copy_smem_to_gmem(self.memory["turned"].at[own], place)

        @pl.when(half == 0)
        def store_scale() -> None:
            copies = self.memory["scale"].at[pl.ds(0, _COPIES)]
            plgpu.copy_smem_to_gmem(copies, scales.at[self.expert, row, column])

        plgpu.wait_smem_to_gmem(0)

    def _scale(self, x: jax.Array, own: Any) -> tuple[jax.Array, jax.Array]:
        """Scale of the block and its reciprocal, each 64 times, from this warpgroup's rows."""
        lines = self.memory["lines"]
        lines[own] = fp8_quantise.largest_magnitudes(x)
        plgpu.barrier_arrive(self.memory["turn"])
        plgpu.barrier_wait(self.memory["turn"])
        # The largest of 128, found by each row for itself: no message between warps.
        every = lax.broadcast_in_dim(lines[...], (PART, SQUARE), [1])
        magnitude = fp8_quantise.largest_magnitudes(self._pairs(every))
        return fp8_quantise.power_of_two(magnitude, self.largest, self.floor)

    def _pairs(self, x: jax.Array) -> jax.Array:
        """x in the registers that `read_transposed` returns, so that both share their scales."""
        return plgpu.layout_cast(x, plgpu.Layout.WGMMA) if self.on_gpu else x
