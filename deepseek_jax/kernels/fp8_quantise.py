"""Quantisation of rows in tiles 1x128 on a Hopper GPU, in one reading (section 3.3.2).

    s[b, m] = max over d in b of |x[m, d]| / 448, rounded up to a power of two
    q[m, d] = x[m, d] / s[b, m] in E4M3

M rows, D columns, b blocks of 128 columns. XLA makes three kernels of these two lines, and reads x
twice (compiled). Here a thread block has a square of 64 rows and one block of columns in registers,
so it reads and writes each number once. There are many more blocks than fit at once, and the
hardware starts one when another ends: loads of some run under the arithmetic of others.

The bits are those of `precision/fp8_tiles.py`, which says why powers of two are made from bits. Its
scales come M(D/128); the products take them (D/128)M, as they are here. Not run on a GPU yet.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS, COLUMNS = 64, 128  # of one thread block
E4M3 = jnp.float8_e4m3fn


def quantise(
    x: jax.Array, *, largest: float, floor: float, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Tiles nearest to x, with power-of-two scales.

    Args:
      x: MD bfloat16; 64 divides M and 128 divides D.
      largest: magnitude that the largest value of a tile is scaled to, at most.
      floor: least magnitude that a scale is made of.
      interpret: parameters of Pallas's interpreter, which runs on any platform; None for a GPU.

    Returns:
      MD float8_e4m3fn, and scales (D/128)M float32.

    Raises:
      ValueError: other sizes.
    """
    rows, columns = x.shape
    if rows % ROWS or columns % COLUMNS:
        raise ValueError(
            f"{rows} x {columns} is not in squares of {ROWS} x {COLUMNS}; pad it with zeros"
        )

    def fp8_quantise(
        x: Any, values: Any, scales: Any, x_smem: Any, values_smem: Any, scales_smem: Any, full: Any
    ) -> None:
        row = pl.ds(lax.axis_index("row") * ROWS, ROWS)
        column = lax.axis_index("column")
        columns = pl.ds(column * COLUMNS, COLUMNS)
        plgpu.copy_gmem_to_smem(x.at[row, columns], x_smem, full)
        plgpu.barrier_wait(full)
        tile = x_smem[...].astype(jnp.float32)
        scale, inverse = _scale(jnp.max(jnp.abs(tile), 1), largest, floor)
        scaled = tile * lax.broadcast_in_dim(inverse, (ROWS, COLUMNS), [0])
        values_smem[...] = jnp.clip(scaled, -largest, largest).astype(E4M3)
        scales_smem[...] = scale
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(values_smem, values.at[row, columns])
        plgpu.copy_smem_to_gmem(scales_smem, scales.at[column, row])
        plgpu.wait_smem_to_gmem(0)

    def swizzled(itemsize: int) -> Any:
        return plgpu.TilingTransform((8, 128 // itemsize)), plgpu.SwizzleTransform(128)

    return plgpu.kernel(
        fp8_quantise,
        out_type=(
            jax.ShapeDtypeStruct((rows, columns), E4M3),
            jax.ShapeDtypeStruct((columns // COLUMNS, rows), jnp.float32),
        ),
        grid=(rows // ROWS, columns // COLUMNS),
        grid_names=("row", "column"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=dict(
            x_smem=plgpu.SMEM((ROWS, COLUMNS), x.dtype, transforms=swizzled(2)),
            values_smem=plgpu.SMEM((ROWS, COLUMNS), E4M3, transforms=swizzled(1)),
            scales_smem=plgpu.SMEM((ROWS,), jnp.float32),
            full=plgpu.Barrier(),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(x)


def _scale(magnitude: jax.Array, largest: float, floor: float) -> tuple[jax.Array, jax.Array]:
    """Least power of two >= magnitude / largest, and its reciprocal; NaN of what is not finite."""
    scale = jnp.maximum(magnitude, jnp.float32(floor)) * jnp.float32(1 / largest)
    finite = scale < jnp.float32(jnp.inf)
    bits = (lax.bitcast_convert_type(scale, jnp.int32) + 0x007FFFFF) & 0x7F800000
    inverse = lax.bitcast_convert_type(0x7F000000 - bits, jnp.float32)
    power = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(finite, power, scale), jnp.where(finite, inverse, jnp.float32(jnp.nan))
