"""FP8 products by the kernels for Hopper, on the types of the portable form.

M rows, K input width, N output width, E experts.

`fp8_linear` and `fp8_grouped` multiply dequantised operands; these functions take the same tiles
and weights and multiply them as they are. Sums are float32 in both, in another order.

    product           x w        x in tiles along K       a transposed copy of w
    input_gradient    d_out w^T  d_out in tiles along N   w as it is
    weight_gradient   x^T d_out  both in tiles along M, transposed (`token_tiles.py`)

Tensor cores contract 8-bit operands along memory only, hence the copies: one byte for each number.
A width that is no multiple of 128, as the 576 of the key-value latent with its rotary key, is
padded with zeros, and so are rows. A weight of which a device's part cuts blocks has no kernel
(`takes`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.kernels import fp8_outer, fp8_product, matmul_tiling
from deepseek_jax.precision.fp8_tiles import BLOCK, Tiles
from deepseek_jax.precision.fp8_weights import Fp8Weight
from deepseek_jax.precision.token_tiles import TokenTiles, turned


def takes(weight: Fp8Weight, depth: int) -> bool:
    """Whether the kernels take a weight whose matrices have `depth` rows.

    They need one scale for each block of 128x128. Where the edge of a device's part cuts a block,
    there is one for each row or column instead, and the product stays portable.
    """
    columns = weight.values.size // depth
    for experts in weight.scales.shape[:-2]:
        columns //= experts
    return weight.scales.shape[-2:] == (-(-depth // BLOCK), -(-columns // BLOCK))


@dataclasses.dataclass(frozen=True)
class HopperProducts:
    """Products of linear layers, dense and by expert, on one GPU: inside `shard_map` only.

    With `sizes`, E int32, rows are sorted by expert, and weights have a matrix for each; without,
    there is one matrix.

    Attributes:
      sms: SMs that a kernel may use. A kernel has one thread block for each. Where communication
        holds SMs, leave these out: a block that finds no room starts when others end, and doubles
        the time.
      pairs: whether two thread blocks may share loads (multicast). Off until a GPU has run them: no
        test without one fails when the agreement between two producers is taken out.
      interpret: as in `fp8_product.product`.
      tilings: of products x w and d_out w^T, to choose from.
    """

    sms: int = matmul_tiling.H100_SMS
    pairs: bool = False
    interpret: Any = None
    tilings: tuple[matmul_tiling.Tiling, ...] = matmul_tiling.PRODUCT_TILINGS

    def product(
        self, tiles: Tiles, weight: Fp8Weight, sizes: jax.Array | None = None, *, dtype: DTypeLike
    ) -> jax.Array:
        """x w: MK, in tiles along K, and matrices KN -> MN in `dtype`; rows of nobody are zero."""
        values, scales = _matrices(weight, tiles.values.shape[1], -1)
        return self._product(tiles, turned(values), scales.mT, sizes, dtype)

    def input_gradient(
        self, tiles: Tiles, weight: Fp8Weight, sizes: jax.Array | None = None, *, dtype: DTypeLike
    ) -> jax.Array:
        """d_out w^T: MN, in tiles along N, and matrices KN -> MK in `dtype`."""
        return self._product(tiles, *_matrices(weight, -1, tiles.values.shape[1]), sizes, dtype)

    def weight_gradient(
        self, x: TokenTiles, d_out: TokenTiles, sizes: jax.Array | None = None
    ) -> jax.Array:
        """x^T d_out: MK and MN in tiles of tokens -> KN float32, or EKN for each expert."""
        depth, width = x.values.shape[0], d_out.values.shape[0]
        left, right = (
            TokenTiles(_padded(tiles.values, 0), _padded(tiles.scales, 1)) for tiles in (x, d_out)
        )
        shape = left.values.shape[0], right.values.shape[0], left.values.shape[1]
        out = fp8_outer.outer(
            left.values,
            left.scales,
            right.values,
            right.scales,
            None if sizes is None else (sizes + BLOCK - 1) // BLOCK,
            tiling=self._tiling(matmul_tiling.OUTER_TILINGS, shape, 1),
            sms=self.sms,
            interpret=self.interpret,
        )[:, :depth, :width]
        return out[0] if sizes is None else out

    def _product(
        self,
        tiles: Tiles,
        weights: jax.Array,
        weight_scales: jax.Array,
        sizes: jax.Array | None,
        dtype: DTypeLike,
    ) -> jax.Array:
        """MK times ENK transposed."""
        (rows, _), (experts, columns, _) = tiles.values.shape, weights.shape
        values, weights = _padded(tiles.values, -1, -2), _padded(weights, -1, -2)
        shape = values.shape[0], weights.shape[1], values.shape[1]
        out = fp8_product.product(
            values,
            _padded(tiles.scales, -2).mT,
            weights,
            weight_scales,
            sizes,
            dtype=dtype,
            tiling=self._tiling(self.tilings, shape, experts),
            sms=self.sms,
            interpret=self.interpret,
        )
        return out[:rows, :columns]

    def _tiling(
        self,
        candidates: tuple[matmul_tiling.Tiling, ...],
        shape: tuple[int, int, int],
        experts: int,
    ) -> matmul_tiling.Tiling:
        allowed = [tiling for tiling in candidates if self.pairs or not tiling.pair]
        return matmul_tiling.choose(allowed, shape, experts, self.sms)


H100 = HopperProducts()


def _matrices(weight: Fp8Weight, depth: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Values EKN and scales E(K/128)(N/128) of a weight; one of K and N is -1, for what is left."""
    scales = weight.scales.reshape(-1, *weight.scales.shape[-2:])
    return weight.values.reshape(scales.shape[0], depth, width), scales


def _padded(x: jax.Array, *axes: int) -> jax.Array:
    """x with zeros at the end of these axes, up to multiples of 128."""
    padding = [(0, 0)] * x.ndim
    for axis in axes:
        padding[axis] = (0, -x.shape[axis] % BLOCK)
    return jnp.pad(x, padding)
