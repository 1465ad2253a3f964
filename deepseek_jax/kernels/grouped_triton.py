"""Grouped matmul on a GPU: Pallas kernels (Triton) behind the contract of `precision/grouped.py`.

M rows, D width in, F width out, E experts.

The number of programs depends on M and E alone, so nothing is read back to the host: a list made on
the device gives each program its expert and its rows. `tests/kernels/test_grouped_triton.py` runs
the kernels in interpret mode and compiles them for an H100. The bfloat16 tile is the fastest of
those that `bench tiles` measured on an H100. jax 0.12 still lowers Pallas kernels through Triton
and warns that it will stop; another backend then has to supply `product` and its two gradients.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

EXACT = lax.Precision.HIGHEST  # no TF32 for float32; products of bfloat16 are exact anyway


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of one program.

    Attributes:
      height, width: rows and columns of the program's part of the result.
      depth: length of the contraction that it holds at once.
      warps: threads in units of 32.
      stages: loads in flight, each of (height + width) * depth numbers.
      neighbours: programs above one another that run at the same time and read the same columns.
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
    """Product rows @ weight[expert of each row], or with the transposed weight.

    Args:
      rows: MD (MF with `transpose`), sorted by expert.
      weight: EDF, same dtype.
      sizes: E int32, rows of each expert; may be zero.
      transpose: whether each expert's weight is transposed.
      tile: None for the dtype's default.
      interpret: whether to emulate the kernel, slowly and on any platform.

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


# Residuals of a product: its rows, weight and sizes.
Saved = tuple[jax.Array, jax.Array, jax.Array]


def rows_gradient(
    saved: Saved, d_out: jax.Array, *, tile: Tile | None = None, interpret: bool = False
) -> jax.Array:
    """Gradient of the rows of `product`: MF -> MD."""
    _, weight, sizes = saved
    return product(d_out, weight, sizes, transpose=True, tile=tile, interpret=interpret)


def weight_gradient(
    saved: Saved,
    d_out: jax.Array,
    *,
    shape: tuple[int, ...] | None = None,
    dtype: DTypeLike | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Gradient of the weight of `product`: EDF, summed in float32 and rounded once.

    Args:
      shape, dtype: of the gradient; None for those of the weight.
    """
    rows, weight, sizes = saved
    shape, dtype = shape or weight.shape, dtype or weight.dtype
    tile = tile or _default_tile(rows.dtype)
    experts, deep, wide = shape
    ends = jnp.cumsum(sizes)
    return _call(
        _weight_gradient_kernel,
        jax.ShapeDtypeStruct(shape, dtype),
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
    """Work list of the programs: expert, first row, and end of that expert's rows.

    Padding rows, those past the last expert's, count as rows of an expert number E. The list has as
    many programs as any sizes can need, in whole sets of neighbours; the first row of an idle
    program is at its end.
    """
    ends = jnp.cumsum(sizes)
    sizes = jnp.append(sizes, rows - ends[-1])
    ends = jnp.append(ends, jnp.asarray(rows, ends.dtype))
    blocks = (sizes + tile.height - 1) // tile.height
    last = jnp.cumsum(blocks)
    most = rows // tile.height + sizes.size
    number = jnp.arange(-(-most // tile.neighbours) * tile.neighbours, dtype=sizes.dtype)
    # "compare_all" because the other methods of searchsorted are a loop or a sort.
    expert = jnp.searchsorted(last, number, side="right", method="compare_all")
    expert = jnp.minimum(expert, sizes.size - 1).astype(sizes.dtype)
    first = (ends - sizes)[expert] + (number - (last - blocks)[expert]) * tile.height
    return expert, jnp.minimum(first, rows), ends[expert]


@dataclasses.dataclass(frozen=True)
class _Run:
    """Indices start, ..., start + size - 1 of one dimension; those from `end` on are outside.

    Attributes:
      whole: whether all are known to be inside when the kernel is built.
    """

    start: jax.Array
    size: int
    end: jax.Array | int
    whole: bool = False

    @classmethod
    def tile(cls, number: jax.Array, size: int, end: int) -> "_Run":
        return cls(number * size, size, end, whole=end % size == 0)


def _inside(down: _Run, right: _Run) -> jax.Array | None:
    """Mask of a matrix's tile, broadcast where a dimension is whole; None if both are."""
    masks = [
        jnp.expand_dims(run.start + jnp.arange(run.size, dtype=jnp.int32) < run.end, 1 - axis)
        for axis, run in enumerate((down, right))
        if not run.whole
    ]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _load(ref: Any, down: _Run, right: _Run, *lead: jax.Array) -> jax.Array:
    """Tile of a matrix, zero outside, where memory may hold any value, even NaN."""
    mask = _inside(down, right)
    other = None if mask is None else jnp.zeros((), ref.dtype)
    at = ref.at[(*lead, pl.ds(down.start, down.size), pl.ds(right.start, right.size))]
    return triton.load(at, mask=mask, other=other)


def _store(ref: Any, value: jax.Array, down: _Run, right: _Run, *lead: jax.Array) -> None:
    at = ref.at[(*lead, pl.ds(down.start, down.size), pl.ds(right.start, right.size))]
    triton.store(at, value.astype(ref.dtype), mask=_inside(down, right))


def _product_kernel(
    experts: Any,
    firsts: Any,
    ends: Any,
    rows: Any,
    weight: Any,
    out: Any,
    *,
    tile: Tile,
    transpose: bool,
) -> None:
    """Kernel of `product`: each program makes a tile of `out`, if the program has rows."""
    block = pl.program_id(2) * tile.neighbours + pl.program_id(0)
    expert, first, end = experts[block], firsts[block], ends[block]
    mine = _Run(first, tile.height, end)
    column = _Run.tile(pl.program_id(1), tile.width, out.shape[1])
    steps = pl.cdiv(rows.shape[1], tile.depth)

    @pl.when(first < end)
    def multiply() -> None:
        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            depth = _Run.tile(i, tile.depth, rows.shape[1])
            matrix = _load(weight, *((column, depth) if transpose else (depth, column)), expert)
            return total + triton.dot(
                _load(rows, mine, depth), matrix, trans_b=transpose, precision=EXACT
            )

        # Padding rows, those of expert E, take no step: their tile is zero.
        count = steps * (expert < weight.shape[0]).astype(jnp.int32)
        zero = jnp.zeros((tile.height, tile.width), jnp.float32)
        _store(out, lax.fori_loop(0, count, step, zero), mine, column)


def _weight_gradient_kernel(
    starts: Any, ends: Any, rows: Any, d_out: Any, d_weight: Any, *, tile: Tile
) -> None:
    """Kernel of `weight_gradient`: each program makes a tile of one expert's `d_weight`."""
    _, deep, wide = d_weight.shape
    sets = pl.cdiv(deep, tile.height * tile.neighbours)
    expert, first = lax.div(pl.program_id(2), sets), lax.rem(pl.program_id(2), sets)
    down = _Run.tile(first * tile.neighbours + pl.program_id(0), tile.height, deep)
    right = _Run.tile(pl.program_id(1), tile.width, wide)
    start, end = starts[expert], ends[expert]

    @pl.when(down.start < deep)
    def multiply() -> None:
        def step(i: jax.Array, total: jax.Array) -> jax.Array:
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
    """Kernel call; programs that differ in the first number of `grid` alone run side by side."""
    params = triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    return pl.pallas_call(
        functools.partial(kernel, tile=tile),
        out,
        grid=grid,
        compiler_params=params,
        interpret=interpret,
    )
