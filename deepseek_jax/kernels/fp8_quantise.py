"""Quantisation of activations on a Hopper GPU, in one reading (section 3.3.2 of the report).

    rows      s[b, m] = power of two >= max over d in b of |x[m, d]| / 448      q = x / s in E4M3
    tokens    s[b, d] = power of two >= max over m in b of |x[m, d]| / 448      q transposed, DM

M rows, D columns, b blocks of 128 columns, or of 128 rows. A linear layer multiplies the rows; the
gradient of its weight contracts tokens, and tensor cores contract 8-bit operands along memory only,
hence the transposed copy. x is read, or made of what is read, number by number, and rounded to
bfloat16: SwiGLU's output, or what tiles hold.

A thread block has a square of 128 x 128 in shared memory, and two warpgroups. Each takes 64 of its
rows, then 64 of its columns. Both kinds of tile lie within a square, so every number is read from
global memory once, and written once. There are more blocks than fit at once, and the hardware
starts one when another ends: loads of some run under the arithmetic of others.

    rows      load 64 x 128; largest of each row; scale; store
    tokens    load 64 x 128 transposed: a thread gets pairs of columns, and a shuffle makes them
              pairs of rows, which are neighbours in the copy; then as above

Largest values are those of the bits of |x|, as integers: their order is that of the floats, with
NaN above infinity. Nothing is clipped: x / s passes 448 by a rounding at most, and E4M3 rounds to
448 again.

Experts: an expert's tiles of 128 tokens begin with its first row, wherever that is, and shared
memory is loaded 64 rows at a time. A tile begins at `first`, in a part of 64 rows that begins at
64 a. Row r goes to place r - 64 a modulo 128 of the tile: its parts a and a + 1, and the rows of
part a + 2 in the places before `first`. Both operands of a weight's gradient have this order, and a
sum over tokens has none. So parts are loaded 1.5 times, from L2, and no row is moved.

The bits are those of `precision/fp8_tiles.py`, which says why powers of two are made from bits. Not
run on a GPU yet.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels.kernel_names import QUANTISE

SQUARE, PART = 128, 64  # rows and columns of a thread block, and rows of a warpgroup
CHUNK = 64  # columns that are made at once: more would hold more registers
E4M3 = jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Square:
    """An operand with a number for each of x.

    Attributes:
      array: MC, bfloat16 or float8_e4m3fn.
      left: the column that the first one of x is made of; a multiple of 128.
    """

    array: jax.Array
    left: int = 0

    def memory(self, parts: int) -> Any:
        """Shared memory of so many parts."""
        return square_memory(self.array.dtype, parts * PART, CHUNK)

    def source(self, ref: Any, rows: Any, column: Any) -> Any:
        """Numbers of the rows of a part, in global memory."""
        return ref.at[rows, _block(column + self.left // SQUARE)]

    def numbers(self, ref: Any, rows: Any, columns: Any, on_gpu: bool) -> jax.Array:
        """Numbers of 64 rows and some columns, float32."""
        return read_rows(ref, (rows, columns), on_gpu).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class PerRow:
    """An operand with a number for each row of x, or for each row in a block of 128 columns.

    Attributes:
      array: BM float32; B is 1 for numbers that all columns share.
      left: as in `Square`.
    """

    array: jax.Array
    left: int = 0

    def memory(self, parts: int) -> Any:
        """Shared memory of so many parts."""
        return plgpu.SMEM((parts * PART,), jnp.float32)

    def source(self, ref: Any, rows: Any, column: Any) -> Any:
        """Numbers of the rows of a part, in global memory."""
        return ref.at[0 if self.array.shape[0] == 1 else column + self.left // SQUARE, rows]

    def numbers(self, ref: Any, rows: Any, columns: Any, on_gpu: bool) -> jax.Array:
        """Numbers of 64 rows, each repeated along its row."""
        del columns, on_gpu
        return lax.broadcast_in_dim(ref[rows], (PART, CHUNK), [0])


Operand = Square | PerRow
Pair = tuple[jax.Array, jax.Array]  # values, and scales with a row for each block of 128


def quantise(
    operands: Sequence[Operand],
    make: Callable[..., jax.Array] | None,
    width: int,
    *,
    rows: bool,
    tokens: bool,
    tiles: jax.Array | None = None,
    largest: float,
    floor: float,
    interpret: Any = None,
) -> tuple[Pair | None, Pair | None]:
    """Tiles nearest to x, with power-of-two scales.

    Args:
      operands: of M rows, a `Square` first. 128 divides M; 64 is enough with `tiles`.
      make: float32 numbers of each operand -> those of x, before they are rounded to bfloat16. It
        is called on parts of 64 x 128. None if x is the one operand, in bfloat16.
      width: D; 128 divides it.
      rows: whether to return tiles of 128 columns: values MD and scales (D/128)M.
      tokens: whether to return tiles of 128 rows: values D(T128) and scales TD; T is M / 128.
      tiles: T3 int32: a, first row, and the row after the last, of each tile of tokens, as the
        module says. A tile without rows has zeros and the scale of the floor. None for rows of one
        expert, in tiles that begin with multiples of 128; otherwise `rows` must be False.
      largest: magnitude that the largest value of a tile is scaled to, at most.
      floor: least magnitude that a scale is made of.
      interpret: parameters of Pallas's interpreter, which runs on any platform; None for a GPU.

    Returns:
      Tiles of rows, and of tokens, float8_e4m3fn and float32; None where not asked for.

    Raises:
      ValueError: other sizes, or rows asked for with `tiles`.
    """
    height = operands[0].array.shape[0]
    step = SQUARE if tiles is None else PART
    if height % step or width % SQUARE:
        raise ValueError(
            f"{height} x {width} is not in squares of {step} x {SQUARE}; pad it with zeros"
        )
    if tiles is not None and rows:
        raise ValueError("tiles of rows do not depend on experts; ask for them without `tiles`")
    count = height // SQUARE if tiles is None else tiles.shape[0]
    results = [("row", height, width)] * rows + [("token", width, count * SQUARE)] * tokens
    scratch = _scratch(operands, 2 if tiles is None else 3, [name for name, _, _ in results])
    if tokens and (make is not None or tiles is not None):
        scratch["turn"] = plgpu.Barrier(num_arrivals=2)
    arrays = {id(operand.array): operand.array for operand in operands}  # gate and up share one

    def body(*refs: Any, **memory: Any) -> None:
        table, refs = (None, refs) if tiles is None else (refs[0], refs[1:])
        block = _Block(operands, make, table, largest, floor, interpret is None, memory)
        block.load(dict(zip(arrays, refs, strict=False)))
        block.fill()
        if rows:
            block.store("row", block.rows(), *refs[len(arrays) : len(arrays) + 2])
        if tokens:
            block.store("token", block.columns(), *refs[-2:])
        plgpu.wait_smem_to_gmem(0)

    out = [
        jax.ShapeDtypeStruct(*shape)
        for _, down, across in results
        for shape in (((down, across), E4M3), ((across // SQUARE, down), jnp.float32))
    ]
    found = call(body, out, (count, width // SQUARE), scratch, interpret)(
        *() if tiles is None else (tiles,), *arrays.values()
    )
    return (found[0], found[1]) if rows else None, (found[-2], found[-1]) if tokens else None


def _scratch(operands: Sequence[Operand], parts: int, results: Sequence[str]) -> dict[str, Any]:
    """Shared memory and barriers of a thread block, by name."""
    scratch = {f"read{number}": it.memory(parts) for number, it in enumerate(operands)}
    scratch["full"] = plgpu.Barrier(num_arrivals=parts * len(operands))
    if operands[0].array.dtype != jnp.bfloat16:
        scratch["made"] = square_memory(jnp.bfloat16)
    for name in results:
        scratch[f"{name}_values"] = square_memory(E4M3)
        scratch[f"{name}_scales"] = plgpu.SMEM((SQUARE,), jnp.float32)
    return scratch


@dataclasses.dataclass(frozen=True)
class _Block:
    """Work of a warpgroup, with the shared memory and barriers of its thread block, by name."""

    operands: Sequence[Operand]
    make: Callable[..., jax.Array] | None
    table: Any
    largest: float
    floor: float
    on_gpu: bool
    memory: dict[str, Any]

    @property
    def own(self) -> Any:
        """Rows of this warpgroup in a square; of the copy, its rows again."""
        return pl.ds(pl.multiple_of(lax.axis_index("half") * PART, PART), PART)

    def load(self, refs: Mapping[int, Any]) -> None:
        """Loads the parts of each operand, of the reference to its array."""
        row, column = lax.axis_index("row"), lax.axis_index("column")
        if self.table is None:
            starts = [row * SQUARE, row * SQUARE + PART]
        else:
            last = self.operands[0].array.shape[0] // PART - 1
            starts = [jnp.minimum(self.table[row, 0] + i, last) * PART for i in range(3)]

        @pl.when(lax.axis_index("half") == 0)
        def start() -> None:
            for number, operand in enumerate(self.operands):
                ref = refs[id(operand.array)]
                memory, full = self.memory[f"read{number}"], self.memory["full"]
                for part, first in enumerate(starts):
                    source = operand.source(ref, pl.ds(first, PART), column)
                    plgpu.copy_gmem_to_smem(source, memory.at[pl.ds(part * PART, PART)], full)

        plgpu.barrier_wait(self.memory["full"])

    @property
    def square(self) -> Any:
        """Memory of x: that of the first operand, if it has the dtype."""
        if self.operands[0].array.dtype == jnp.bfloat16:
            return self.memory["read0"].at[pl.ds(0, SQUARE)]
        return self.memory["made"]

    def fill(self) -> None:
        """Makes x of the operands, where it is not what was loaded."""
        if self.make is None and self.table is None:
            return
        square = self.square
        for chunk in range(0, SQUARE, CHUNK):
            columns = pl.ds(chunk, CHUNK)
            parts = [
                self._numbers(operand, self.memory[f"read{number}"], columns)
                for number, operand in enumerate(self.operands)
            ]
            x = (self.make(*parts) if self.make else parts[0]).astype(jnp.bfloat16)
            if self.table is not None:
                _, row, end = self._places()
                x = jnp.where(row < end, x, jnp.zeros((), x.dtype))
            square[self.own, columns] = x
        if "turn" in self.memory:
            plgpu.barrier_arrive(self.memory["turn"])
            plgpu.barrier_wait(self.memory["turn"])

    def _numbers(self, operand: Operand, ref: Any, columns: Any) -> jax.Array:
        """An operand's numbers for this warpgroup's rows of the square, 64 x 64 float32."""
        found = operand.numbers(ref, self.own, columns, self.on_gpu)
        if self.table is None:
            return found
        late, _, _ = self._places()
        return jnp.where(
            late, operand.numbers(ref, pl.ds(SQUARE, PART), columns, self.on_gpu), found
        )

    def _places(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Places that part a + 2 fills, the row of each place, and the row after the last."""
        first, start, end = (self.table[lax.axis_index("row"), i] for i in range(3))
        place = lax.broadcasted_iota(jnp.int32, (PART, CHUNK), 0)
        place += lax.axis_index("half") * PART
        late = place < start - first * PART
        return late, first * PART + place + jnp.where(late, SQUARE, 0), end

    def rows(self) -> jax.Array:
        """This warpgroup's rows of x, 64 x 128 bfloat16."""
        return read_rows(self.square, self.own, self.on_gpu)

    def columns(self) -> jax.Array:
        """This warpgroup's columns of x, transposed, 64 x 128 bfloat16."""
        return read_transposed(self.square, self.own, self.on_gpu)

    def store(self, name: str, x: jax.Array, values: Any, scales: Any) -> None:
        """Quantises 64 rows of x, or of its transpose, and starts their copy to global memory."""
        row, column = lax.axis_index("row"), lax.axis_index("column")
        if name == "token":
            row, column = column, row
        scale, inverse = power_of_two(largest_magnitudes(x), self.largest, self.floor)
        values_memory, scales_memory = (
            self.memory[f"{name}_{of}"].at[self.own] for of in ("values", "scales")
        )
        values_memory[...] = scaled(x, inverse)
        scales_memory[...] = scale
        plgpu.commit_smem()
        place = pl.ds(row * SQUARE + lax.axis_index("half") * PART, PART)
        plgpu.copy_smem_to_gmem(values_memory, values.at[place, _block(column)])
        plgpu.copy_smem_to_gmem(scales_memory, scales.at[column, place])


def call(
    body: Callable[..., None],
    out: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int],
    scratch: dict[str, Any],
    interpret: Any,
) -> Callable[..., Sequence[jax.Array]]:
    """A kernel of two warpgroups for each square, as a function of its operands."""
    body.__name__ = QUANTISE  # also in compiled programs
    return plgpu.kernel(
        body,
        out_type=tuple(out),
        grid=grid,
        grid_names=("row", "column"),
        num_threads=2,
        thread_name="half",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=0
        ),
        interpret=interpret,
    )


def square_memory(dtype: Any, rows: int = SQUARE, chunk: int = SQUARE) -> Any:
    """Shared memory of rows of 128 numbers, without bank conflicts for copies and registers.

    Args:
      chunk: columns that are read at once, if not all.
    """
    itemsize = jnp.dtype(dtype).itemsize
    columns = min(chunk, 128 // itemsize)
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * itemsize)
    return plgpu.SMEM((rows, SQUARE), dtype, transforms=transforms)


def read_rows(square: Any, index: Any, on_gpu: bool) -> jax.Array:
    """Part of a square. A thread gets four neighbours of a row: in E4M3, one store."""
    x = square[index]
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA_8BIT) if on_gpu else x


def read_transposed(square: Any, columns: Any, on_gpu: bool) -> jax.Array:
    """Columns of a square as rows. A thread reads neighbours of a row, and gets those of a column.

    Args:
      square: shared memory, of 16 or 32 bits a number.
    """
    if not on_gpu:  # the interpreter of jax 0.10 does not read a transposed reference
        return square[:, columns].T
    pairs = plgpu.layout_cast(square.at[:, columns].T[...], plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(pairs, plgpu.Layout.WGMMA)


def largest_magnitudes(x: jax.Array) -> jax.Array:
    """Largest |x| of each row, in float32; NaN if there is one.

    Args:
      x: bfloat16 or float32.
    """
    integer = jnp.int16 if x.dtype == jnp.bfloat16 else jnp.int32
    bits = lax.bitcast_convert_type(x, integer) & jnp.asarray(jnp.iinfo(integer).max, integer)
    return lax.bitcast_convert_type(jnp.max(bits, 1), x.dtype).astype(jnp.float32)


def power_of_two(magnitude: jax.Array, largest: float, floor: float) -> tuple[jax.Array, jax.Array]:
    """Least power of two >= magnitude / largest, and its reciprocal; NaN of what is not finite."""
    scale = jnp.maximum(magnitude, jnp.float32(floor)) * jnp.float32(1 / largest)
    finite = scale < jnp.float32(jnp.inf)
    bits = (lax.bitcast_convert_type(scale, jnp.int32) + 0x007FFFFF) & 0x7F800000
    inverse = lax.bitcast_convert_type(0x7F000000 - bits, jnp.float32)
    power = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(finite, power, scale), jnp.where(finite, inverse, jnp.float32(jnp.nan))


def scaled(x: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows times reciprocals of their scales, in E4M3."""
    return (x.astype(jnp.float32) * lax.broadcast_in_dim(inverse, x.shape, [0])).astype(E4M3)


def _block(number: Any) -> Any:
    return pl.ds(number * SQUARE, SQUARE)
