"""Attention in programs compiled for virtual H100s; nothing runs.

cuDNN's in training: calls, residuals and FLOPs of two layers in a scan, each of which saves what
the report saves, inside `shard_map`. Our kernel's in decoding: its registers.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.aot import cluster, compiled
from deepseek_jax.config import MeshConfig
from deepseek_jax.kernels import kernel_names
from deepseek_jax.model import absorbed_attention, remat
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.mla import attend_and_project
from deepseek_jax.precision.recipes import BFLOAT16

LAYERS, DEVICES, S, D, H, X, W = 2, 8, 1024, 256, 8, 192, 128
RECIPE = dataclasses.replace(BFLOAT16, kernels=frozenset({kernel_names.ATTENTION}))
HOW = Execution(recipe=RECIPE, remat=remat.REPORT)
AXES = ("node", "gpu")


def layer(x, weights):
    """A residual layer of attention, x BSD."""
    *into, out = weights
    parts = [RECIPE.einsum("BSD,DHX->BSHX", x, weight) for weight in into]
    project = functools.partial(RECIPE.einsum, "BSHW,HWD->BSD")
    return x + attend_and_project(*parts, project, out, HOW, X**-0.5), None


def gradients(mesh):
    def local(x, weights):
        def loss(x, weights):
            out, _ = lax.scan(HOW.remat.layer(layer), x, weights)
            return jnp.square(out.astype(jnp.float32)).sum()

        return jax.grad(loss, (0, 1))(x, weights)

    specs = P(AXES), P()
    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    )


SHAPES = (
    ((DEVICES, S, D), P(AXES)),
    [((LAYERS, D, H, width), P()) for width in (X, X, W)] + [((LAYERS, H, W, D), P())],
)


def arguments(mesh=None):
    def one(shape, spec):
        place = NamedSharding(mesh, spec) if mesh else None
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    return one(*SHAPES[0]), [one(*each) for each in SHAPES[1]]


@pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "")
def test_one_call_forward_and_one_backward():
    """Each once in the text for all layers: recomputation asks for no attention again.

    Layers save output and sums; no array has the size of the scores.
    """
    mesh = cluster.mesh(MeshConfig(pipe=1, replica=1, node=2, gpu=4, tensor=1))
    with jax.set_mesh(mesh):
        lowered = gradients(mesh).lower(*arguments(mesh))
    program = compiled.read(cluster.compile_for(lowered), mesh)
    calls = {gemm.op: gemm for gemm in program.gemms if "cudnn" in gemm.op}
    assert {name: gemm.times for name, gemm in calls.items()} == {
        "__cudnn$fmhaSoftmax": LAYERS,
        "__cudnn$fmhaSoftmaxBackward": LAYERS,
    }
    assert sum(line.target in calls for line in lines(program)) == 2
    # Causal: half of 2 S^2 H for each of the products' widths (1 + 1, then 5).
    flops = {name.endswith("Backward"): gemm.flops for name, gemm in calls.items()}
    assert flops == {False: S * S * H * (X + W), True: S * S * H * (3 * X + 2 * W)}
    # A float32 for each number of the queries and each row of the scores.
    assert program.workspace_bytes == 4 * S * H * (X + 1)
    arrays = [array for line in lines(program) for array in line.arrays]
    floats = [array for array in arrays if "f" in array.dtype]  # others are of cuBLAS
    assert max(array.elements for array in floats) < H * S * S
    saved = {(array.dtype, array.shape) for array in arrays if array.shape[:1] == (LAYERS,)}
    assert {("bf16", (LAYERS, 1, S, H * W)), ("f32", (LAYERS, 1, H, S))} <= saved
    assert not any(shape[-1] == X and S in shape for _, shape in saved)


def lines(program):
    return [line for each in program.module.computations.values() for line in each.values()]


def test_a_program_for_cpus_calls_no_library():
    mesh = jax.make_mesh((2, 4), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert "cudnn" not in gradients(mesh).lower(*arguments()).as_text()


@pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "")
def test_absorbed_attention_spills_nothing(tmp_path, monkeypatch):
    """V3's widths and two tokens at once: chosen for a GPU, one kernel, sums that stay in place."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    mesh = cluster.mesh(MeshConfig(pipe=1, replica=1, node=1, gpu=1, tensor=1))
    place = NamedSharding(mesh, P())
    shapes = (8, 2, 128, 512), (8, 2, 128, 64), (8, 4096, 512), (8, 4096, 64)
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    positions = jax.ShapeDtypeStruct((8, 2), jnp.int32, sharding=place)
    kernels = frozenset({kernel_names.LATENT_ATTENTION})

    def attend(*given):
        return absorbed_attention.latent_attention(*given, 0.1, kernels)

    with jax.set_mesh(mesh):
        text = cluster.compile_for(jax.jit(attend).lower(*given, positions)).as_text()
    assert len(re.findall("mosaic_gpu_v2", text)) == 1 and "/latent_attention/" in text
    (said,) = (path.read_text() for path in tmp_path.glob("*.ptxas"))
    (code,) = (path.read_text() for path in tmp_path.glob("*.ptx"))
    assert re.findall(r"(\d+) bytes spill", said) == ["0", "0"], said  # stores, loads
    assert "C7510" not in said and "setmaxnreg" not in said  # no serialised products
    products = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.([\w.]+)", code))
    assert products == {"m64n32k16.f32.bf16.bf16", "m64n256k16.f32.bf16.bf16"}
