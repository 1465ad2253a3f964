"""Grouped matmul on a GPU: Pallas kernels (Triton) behind the contract of `precision/grouped.py`.

M rows, D width in, F width out, E experts. The number of programs is fixed by M and E, so nothing
is read back to the host: which expert a program works for, and on which rows, is in a list computed
on the device. `tests/precision/test_grouped_kernel.py` runs the kernels in interpret mode and
compiles them for an H100; the bfloat16 tile is the fastest of those that `bench tiles` tried on
one. jax 0.12 still runs Pallas kernels by way of Triton and warns that it will stop: `product` and
the two gradients are then what another backend has to supply.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

EXACT = lax.Precision.HIGHEST  # float32 is not TF32; bfloat16 operands are exact anyway


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program computes, and how.

    Attributes:
      height, width: of its part of the result.
      depth: how much of the contraction it holds at once.
      warps, stages: threads in 32s; loads in flight, each of (height + width) * depth numbers.
      neighbours: programs above one another that run at the same time, to share what they read.
    """

    height: int = 128
    width: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 3
    neighbours: int = 16


BFLOAT16_TILE = Tile()
FLOAT32_TILE = Tile(height=64, width=128, depth=32)


def product(
    rows: jax.Array,
    weight: jax.Array,
    sizes: jax.Array,
    *,
    transpose: bool = False,
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """rows @ weight[expert of each], or with `transpose` rows @ weight[expert of each]^T.

    Args:
      rows: MD (MF to transpose), sorted by expert.
      weight: EDF, same dtype.
      sizes: E int32, rows of each expert; may be zero.
      tile: None for the dtype's own.
      interpret: run on any platform, slowly.

    Returns:
      MF (MD), `rows.dtype`, summed in float32; rows past sum(sizes) are zero.
    """
    tile = tile or _default_tile(rows.dtype)
    width = weight.shape[1 if transpose else 2]
    blocks = _blocks(sizes, rows.shape[0], tile)
    return _call(
        functools.partial(_product_kernel, transpose=transpose),
        jax.ShapeDtypeStruct((rows.shape[0], width), rows.dtype),
        grid=(tile.neighbours, pl.cdiv(width, tile.width), blocks[0].size // tile.neighbours),
        tile=tile,
        interpret=interpret,
    )(*blocks, rows, weight)


# What a product was given: rows, weight, sizes.
Saved = tuple[jax.Array, jax.Array, jax.Array]


def rows_gradient(
    saved: Saved, d_out: jax.Array, *, tile: Tile | None = None, interpret: bool = False
) -> jax.Array:
    """Of `product`'s rows: MD from MF."""
    _, weight, sizes = saved
    return product(d_out, weight, sizes, transpose=True, tile=tile, interpret=interpret)


def weight_gradient(
    saved: Saved, d_out: jax.Array, *, tile: Tile | None = None, interpret: bool = False
) -> jax.Array:
    """Of `product`'s weight: EDF, in its dtype."""
    rows, weight, sizes = saved
    tile = tile or _default_tile(rows.dtype)
    experts, deep, wide = weight.shape
    ends = jnp.cumsum(sizes)
    return _call(
        _weight_gradient_kernel,
        jax.ShapeDtypeStruct(weight.shape, weight.dtype),
        grid=(
            tile.neighbours,
            pl.cdiv(wide, tile.width),
            experts * pl.cdiv(deep, tile.height * tile.neighbours),
        ),
        tile=tile,
        interpret=interpret,
    )(ends - sizes, ends, rows, d_out)


def _default_tile(dtype: jnp.dtype) -> Tile:
    return FLOAT32_TILE if dtype == jnp.float32 else BFLOAT16_TILE


def _blocks(sizes: jax.Array, rows: int, tile: Tile) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What each program multiplies: its expert, its first row, and where the expert's rows end.

    The rows past the last expert's are those of an expert of their own, number E. As many programs
    as any sizes can need, in whole sets of neighbours; one with nothing to do starts at its end.
    """
    ends = jnp.cumsum(sizes)
    sizes = jnp.append(sizes, rows - ends[-1])
    ends = jnp.append(ends, jnp.asarray(rows, ends.dtype))
    blocks = (sizes + tile.height - 1) // tile.height
    last = jnp.cumsum(blocks)
    most = rows // tile.height + sizes.size
    number = jnp.arange(-(-most // tile.neighbours) * tile.neighbours, dtype=sizes.dtype)
    # One comparison with each expert: the other methods of searchsorted are a loop or a sort.
    expert = jnp.searchsorted(last, number, side="right", method="compare_all")
    expert = jnp.minimum(expert, sizes.size - 1).astype(sizes.dtype)
    first = (ends - sizes)[expert] + (number - (last - blocks)[expert]) * tile.height
    return expert, jnp.minimum(first, rows), ends[expert]


@dataclasses.dataclass(frozen=True)
class _Run:
    """Indices start, ..., start + size - 1 of one dimension, of which those from `end` on are out.

    `whole` says that none is, known when the kernel is built.
    """

    start: jax.Array
    size: int
    end: jax.Array | int
    whole: bool = False

    @classmethod
    def tile(cls, number: jax.Array, size: int, end: int) -> "_Run":
        return cls(number * size, size, end, whole=end % size == 0)


def _inside(down: _Run, right: _Run) -> jax.Array | None:
    """Mask of a matrix's tile, as far as it has to be spelt out; None if all of it is inside."""
    masks = [
        jnp.expand_dims(run.start + jnp.arange(run.size, dtype=jnp.int32) < run.end, 1 - axis)
        for axis, run in enumerate((down, right))
        if not run.whole
    ]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _load(ref, down: _Run, right: _Run, *lead: jax.Array) -> jax.Array:
    """The tile of a matrix, zero outside: what lies there may be anything, NaN too."""
    mask = _inside(down, right)
    other = None if mask is None else jnp.zeros((), ref.dtype)
    at = ref.at[(*lead, pl.ds(down.start, down.size), pl.ds(right.start, right.size))]
    return triton.load(at, mask=mask, other=other)


def _store(ref, value: jax.Array, down: _Run, right: _Run, *lead: jax.Array) -> None:
    at = ref.at[(*lead, pl.ds(down.start, down.size), pl.ds(right.start, right.size))]
    triton.store(at, value.astype(ref.dtype), mask=_inside(down, right))


def _product_kernel(experts, firsts, ends, rows, weight, out, *, tile: Tile, transpose: bool):
    block = pl.program_id(2) * tile.neighbours + pl.program_id(0)
    expert, first, end = experts[block], firsts[block], ends[block]
    mine = _Run(first, tile.height, end)
    column = _Run.tile(pl.program_id(1), tile.width, out.shape[1])
    steps = pl.cdiv(rows.shape[1], tile.depth)

    @pl.when(first < end)
    def multiply():
        def step(i, total):
            depth = _Run.tile(i, tile.depth, rows.shape[1])
            matrix = _load(weight, *((column, depth) if transpose else (depth, column)), expert)
            return total + triton.dot(
                _load(rows, mine, depth), matrix, trans_b=transpose, precision=EXACT
            )

        # Nobody's rows, those of expert E, take no step.
        count = steps * (expert < weight.shape[0]).astype(jnp.int32)
        zero = jnp.zeros((tile.height, tile.width), jnp.float32)
        _store(out, lax.fori_loop(0, count, step, zero), mine, column)


def _weight_gradient_kernel(starts, ends, rows, d_out, d_weight, *, tile: Tile):
    _, deep, wide = d_weight.shape
    sets = pl.cdiv(deep, tile.height * tile.neighbours)
    expert, first = lax.div(pl.program_id(2), sets), lax.rem(pl.program_id(2), sets)
    down = _Run.tile(first * tile.neighbours + pl.program_id(0), tile.height, deep)
    right = _Run.tile(pl.program_id(1), tile.width, wide)
    start, end = starts[expert], ends[expert]

    @pl.when(down.start < deep)
    def multiply():
        def step(i, total):
            mine = _Run(start + i * tile.depth, tile.depth, end)
            return total + triton.dot(
                _load(rows, mine, down), _load(d_out, mine, right), trans_a=True, precision=EXACT
            )

        zero = jnp.zeros((tile.height, tile.width), jnp.float32)
        count = pl.cdiv(end - start, tile.depth)
        _store(d_weight, lax.fori_loop(0, count, step, zero), down, right, expert)


def _call(
    kernel: Callable[..., None],
    out: jax.ShapeDtypeStruct,
    grid: tuple[int, ...],
    tile: Tile,
    interpret: bool,
) -> Callable[..., jax.Array]:
    """Programs that differ in the first number of `grid` alone run next to each other."""
    params = triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    return pl.pallas_call(
        functools.partial(kernel, tile=tile),
        out,
        grid=grid,
        compiler_params=params,
        interpret=interpret,
    )
