"""FP8 kernels compiled for an H100: nothing spilled, the tensor cores' FP8 product, one kernel.

Nothing here runs. `ptxas` says what a kernel needs; where a tiling spills, its number of registers
for the producer is wrong for this version of ptxas.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.aot import cluster
from deepseek_jax.config import MeshConfig
from deepseek_jax.kernels import fp8_outer, fp8_product
from deepseek_jax.kernels.matmul_tiling import H100_SMS, OUTER_TILINGS, PRODUCT_TILINGS
from deepseek_jax.precision.fp8_hopper_quantise import HopperQuantiser
from deepseek_jax.precision.fp8_sources import FromKept, FromSwiGLU, Plain
from deepseek_jax.precision.fp8_tiles import Tiles
from deepseek_jax.precision.fp8_weights import Linear

pytestmark = pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "")

M, N, K, E = 32_768, 4096, 7168, 4  # gate and up of the experts on one of 64 devices
E4M3 = jnp.float8_e4m3fn


@functools.cache
def h100():
    return cluster.mesh(MeshConfig(pipe=1, replica=1, node=1, gpu=1, tensor=1))


def operand(shape, dtype=E4M3):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(h100(), P()))


@pytest.fixture
def compile_kernel(tmp_path, monkeypatch):
    """Compiles a kernel -> what ptxas says, its instructions, text of the program."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")

    def run(fn, *operands):
        with jax.set_mesh(h100()):
            text = cluster.compile_for(jax.jit(fn).lower(*operands)).as_text()
        (said,) = (path.read_text() for path in tmp_path.glob("*.ptxas"))
        (code,) = (path.read_text() for path in tmp_path.glob("*.ptx"))
        return said, code, text

    return run


def check(said, code, text, name):
    """One kernel of that name; no spills; products in E4M3 that ptxas does not serialise."""
    assert len(re.findall("mosaic_gpu_v2", text)) == 1 and f"/{name}/" in text
    assert re.findall(r"(\d+) bytes spill", said) == ["0", "0"], said  # stores, loads
    assert "C7510" not in said and "setmaxnreg" not in said
    products = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.([\w.]+)", code))
    assert products == {"m64n128k32.f32.e4m3.e4m3"}


@pytest.mark.parametrize("tiling", PRODUCT_TILINGS, ids=str)
def test_products_of_all_experts(compile_kernel, tiling):
    fn = functools.partial(fp8_product.product, dtype=jnp.bfloat16, tiling=tiling, sms=H100_SMS)
    operands = (
        operand((M, K)), operand((K // 128, M), jnp.float32),
        operand((E, N, K)), operand((E, N // 128, K // 128), jnp.float32),
        operand((E,), jnp.int32),
    )  # fmt: skip
    check(*compile_kernel(fn, *operands), "fp8_product")


@pytest.mark.parametrize("tiling", OUTER_TILINGS, ids=str)
def test_outer_products_of_all_experts(compile_kernel, tiling):
    fn = functools.partial(fp8_outer.outer, tiling=tiling, sms=H100_SMS)
    operands = (
        operand((K, M)), operand((M // 128, K), jnp.float32),
        operand((N, M)), operand((M // 128, N), jnp.float32),
        operand((E,), jnp.int32),
    )  # fmt: skip
    check(*compile_kernel(fn, *operands), "fp8_outer")


def tiles_of(width):
    return Tiles(operand((M, width)), operand((M, width // 128), jnp.float32))


PER_ROW = (M,), jnp.float32
QUANTISERS = {
    "both": ("both", lambda: (Plain(operand((M, K), jnp.bfloat16)),), 80),
    "SwiGLU": (
        "rows",
        lambda: (FromSwiGLU(operand((M, N), jnp.bfloat16), operand(*PER_ROW)),),
        112,
    ),
    "kept, experts": (
        "tokens_of_experts",
        lambda: (FromKept(tiles_of(K)), operand((E,), jnp.int32)),
        168,
    ),
}


@pytest.mark.parametrize("name", QUANTISERS)
def test_quantised_activations(compile_kernel, name):
    """One reading, and one kernel; the cast rounds to nearest in hardware.

    The registers let three thread blocks share an SM, as their shared memory does, or two of
    SwiGLU, or one.
    """
    method, inputs, registers = QUANTISERS[name]
    said, code, text = compile_kernel(getattr(HopperQuantiser(), method), *inputs())
    assert len(re.findall("mosaic_gpu_v2", text)) == 1 and "/fp8_quantise/" in text
    assert re.findall(r"(\d+) bytes spill", said) == ["0", "0"], said
    assert int(re.search(r"Used (\d+) registers", said)[1]) <= registers
    assert "cvt.rn.satfinite.e4m3x2.f32" in code
    assert "max.s16" in code and "max.NaN.bf16" not in code  # of bits, which keep a NaN
    if name == "SwiGLU":  # as XLA for GPUs computes it, instruction by instruction
        assert len(re.findall(r"rcp\.approx\.f32", code)) == 64
        assert len(re.findall(r"ex2\.approx\.ftz\.f32", code)) == 64


def test_quantised_weights(compile_kernel):
    linear = Linear.whole("-io", (E, K, N))
    weights = operand((E, K, N), jnp.float32)
    said, code, text = compile_kernel(
        lambda x: HopperQuantiser().blocks_and_copy(x, linear), weights
    )
    assert len(re.findall("mosaic_gpu_v2", text)) == 1 and "/fp8_quantise/" in text
    assert re.findall(r"(\d+) bytes spill", said) == ["0", "0"], said
    assert int(re.search(r"Used (\d+) registers", said)[1]) <= 128  # two thread blocks to an SM
    assert "cvt.rn.satfinite.e4m3x2.f32" in code
