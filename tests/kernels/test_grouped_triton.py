"""The GPU kernels of the grouped matmul: run here in interpret mode, compiled for an H100.

Numbers are small integers, which float32 sums exactly in any order, so results are compared
exactly; those in bfloat16 are the same after one rounding. Tiles are small, for many of them.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations.grouped import by_loop
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.aot import cluster
from deepseek_jax.config import MeshConfig
from deepseek_jax.kernels import grouped_triton
from deepseek_jax.precision import grouped

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TILE = grouped_triton.Tile(height=16, width=16, depth=16, neighbours=2)
ROWS, EXPERTS = 75, 4
EVEN, RAGGED = (32, 48), (20, 35)  # widths D and F: whole tiles, and not


def interpreted(portable, kernel):
    return functools.partial(kernel, tile=TILE, interpret=True)


def portable(portable, kernel):
    return portable


def integers(*shape, seed):
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def with_gradients(backend, likely=ROWS):
    def run(rows, weight, sizes, pull):
        fn = functools.partial(grouped.grouped_matmul, likely=likely, backend=backend)
        out, back = jax.vjp(lambda rows, weight: fn(rows, weight, sizes), rows, weight)
        return out, *back(pull)

    return jax.jit(run)


@functools.cache
def compiled(backend):
    return with_gradients(backend)


# Cuts of the rows into experts; rows behind the last cut belong to no expert.
sizes_of_all = st.lists(st.integers(0, ROWS), min_size=EXPERTS, max_size=EXPERTS).map(
    lambda cuts: [int(n) for n in np.diff([0, *sorted(cuts)])]
)
CORNERS = [
    [0, 0, 0, 0],
    [ROWS, 0, 0, 0],
    [0, 0, 0, ROWS],
    [16, 32, 0, 16],  # whole tiles
    [17, 15, 1, 33],
    [0, 0, 1, 0],
]


def with_corners(test):
    return functools.reduce(lambda test, sizes: example(sizes=sizes)(test), CORNERS, test)


@pytest.mark.parametrize(
    "widths, dtype", [(EVEN, "float32"), (RAGGED, "float32"), (RAGGED, "bfloat16")]
)
@settings(max_examples=12, deadline=None, derandomize=True)
@with_corners
@given(sizes=sizes_of_all)
def test_any_sizes_give_the_loop_over_experts(widths, dtype, sizes):
    wide, narrow = widths
    rows, pull = integers(ROWS, wide, seed=0), integers(ROWS, narrow, seed=2)
    weight = integers(EXPERTS, wide, narrow, seed=1)
    want = by_loop(rows, weight, sizes, pull)
    used = sum(sizes)
    rows[used:], pull[used:] = np.nan, 1e9  # rows of no expert are never read
    arguments = [jnp.asarray(part, dtype) for part in (rows, weight)]
    arguments += [jnp.asarray(sizes, jnp.int32), jnp.asarray(pull, dtype)]
    for part, exact, other in zip(
        compiled(interpreted)(*arguments), want, compiled(portable)(*arguments), strict=True
    ):
        assert part.dtype == dtype
        np.testing.assert_array_equal(part, exact.astype(np.float32).astype(part.dtype))
        np.testing.assert_array_equal(part, other)


@pytest.mark.parametrize("rows", [1, 15, 16])
def test_fewer_rows_than_a_tile(rows):
    sizes = np.array([rows // 2, 0, rows - rows // 2, 0], np.int32)
    x, weight, pull = (
        integers(rows, 20, seed=0),
        integers(4, 20, 35, seed=1),
        integers(rows, 35, seed=2),
    )
    got = with_gradients(interpreted)(x, weight, sizes, pull)
    for part, exact in zip(got, by_loop(x, weight, sizes, pull), strict=True):
        np.testing.assert_array_equal(part, exact)


def test_bfloat16_sums_in_float32():
    """256 + 1 is 256 in bfloat16, so a sum kept in it never reaches 512; over D, F and rows."""
    ones = np.ones((257, 257), np.float32)
    ones[0] = 256
    first_is_large = jnp.asarray(ones.T, jnp.bfloat16)  # 256, 1, 1, ... in each row
    weight = jnp.ones((1, 257, 257), jnp.bfloat16)
    out, d_rows, _ = compiled(interpreted)(
        first_is_large, weight, np.array([257], np.int32), first_is_large
    )
    np.testing.assert_array_equal(out, 512)
    np.testing.assert_array_equal(d_rows, 512)
    last = jnp.asarray(ones, jnp.bfloat16)  # the first row is large
    *_, d_weight = compiled(interpreted)(
        last, weight, np.array([257], np.int32), jnp.ones_like(last)
    )
    np.testing.assert_array_equal(d_weight, 512)


@functools.cache
def blocks():
    return jax.jit(lambda sizes: grouped_triton._blocks(sizes, ROWS, TILE))


@settings(max_examples=40, deadline=None, derandomize=True)
@with_corners
@given(sizes=sizes_of_all)
def test_blocks_cover_every_row_once(sizes):
    found = zip(*map(np.asarray, blocks()(np.array(sizes, np.int32))), strict=True)
    walked = [
        (row, expert)
        for expert, first, end in found
        for row in range(first, min(first + TILE.height, end))
    ]
    nobodys = ROWS - sum(sizes)
    assert walked == list(zip(range(ROWS), np.repeat(range(5), [*sizes, nobodys]), strict=True))


def test_in_a_scan_with_recomputation_on_each_device():
    mesh = jax.make_mesh((4,), ("gpu",), axis_types=(AxisType.Auto,))
    x = integers(4 * 40, 20, seed=0)
    up, down = integers(3, 8, 20, 35, seed=1), integers(3, 8, 35, 20, seed=2)
    sizes = np.array([10, 0, 20, 7, 0, 0, 0, 0], np.int32)

    def gradients(backend):
        def layer(x, weights, sizes):
            grouped_matmul = functools.partial(grouped.grouped_matmul, likely=37, backend=backend)
            hidden = jnp.tanh(grouped_matmul(x, weights[0], sizes) / 8)
            return x + grouped_matmul(hidden, weights[1], sizes) / 8, None

        def loss(x, up, down, sizes):
            layers = jax.checkpoint(lambda x, weights: layer(x, weights, sizes))
            out, _ = lax.scan(layers, x, (up, down))
            return (out**2).sum()

        experts = P(None, "gpu")
        run = jax.shard_map(
            jax.grad(loss, argnums=(0, 1, 2)),
            mesh=mesh,
            in_specs=(P("gpu"), experts, experts, P("gpu")),
            out_specs=(P("gpu"), experts, experts),
            check_vma=False,
        )
        return jax.jit(run)(x, up, down, sizes)

    for part, want in zip(gradients(interpreted), gradients(portable), strict=True):
        # Sums of float32 in two orders, through three layers.
        np.testing.assert_allclose(part, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


# jax 0.12 warns of this when it lowers for a GPU; see the module's docstring.
lowers_for_a_gpu = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


def kernels_in(text):
    return text.count("__gpu$xla.gpu.triton")


@lowers_for_a_gpu
def test_the_platform_it_is_lowered_for_decides():
    """The target platform decides, not the platform of lowering, which is a CPU."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("gpu",), axis_types=(AxisType.Auto,), abstract_device=device)
    shapes = ((ROWS, 32), (EXPERTS, 32, 48), (EXPERTS,), (ROWS, 48))
    dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = with_gradients(grouped.by_platform).trace(
            *map(jax.ShapeDtypeStruct, shapes, dtypes)
        )
        assert kernels_in(traced.lower(lowering_platforms=("cuda",)).as_text()) == 3
        on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert kernels_in(on_cpu) == 0 and "stablehlo.while" in on_cpu


@pytest.fixture(scope="module")
def h100():
    """Mesh of one virtual H100."""
    if problem := cluster.missing():
        pytest.skip(problem)
    return cluster.mesh(MeshConfig(pipe=1, replica=1, node=1, gpu=1, tensor=1))


@lowers_for_a_gpu
@pytest.mark.parametrize(
    "width, out, dtype",
    [(7168, 4096, "bfloat16"), (2048, 7168, "bfloat16"), (7168, 4096, "float32")],
)
def test_compiles_for_an_h100_at_full_size(h100, tmp_path, width, out, dtype):
    """4096 tokens of each of 64 devices, 4 of 256 experts on one: both matmuls of its experts."""
    rows, experts = 32_768, 4
    shapes = ((rows, width), (experts, width, out), (experts,), (rows, out))
    arguments = [
        jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(h100, P()))
        for shape, kind in zip(shapes, (dtype, dtype, "int32", dtype), strict=True)
    ]
    with jax.set_mesh(h100):
        lowered = with_gradients(grouped.by_platform, likely=rows).lower(*arguments)
    options = {
        "xla_dump_to": str(tmp_path),
        "xla_gpu_fail_ptx_compilation_on_register_spilling": True,
    }
    compiled = cluster.compile_for(lowered, options)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    print(f"{dtype} {width}x{out}: {memory.temp_size_in_bytes:,} bytes of temporaries")
    assert kernels_in(text) == 3
    assert " while(" not in text and " conditional(" not in text  # no control flow on the host
    assert memory.temp_size_in_bytes < 2**16  # work lists: no copy of rows, weights or gradients
    code = "".join(path.read_text() for path in tmp_path.glob("*.ptx"))
    if not code and jax.__version_info__ >= (0, 12):
        return  # its XLA writes no PTX with a dump
    kernels = code[code.index("_kernel(") :]
    products = set(
        re.findall(r"(?:wgmma\.mma_async|mma\.sync|fma\.rn)[a-z0-9.]*f32[a-z0-9.]*", kernels)
    )
    assert products, "no multiply-add in float32 found"
    if dtype == "bfloat16":
        assert re.search(r"cp\.async\.cg.*0x10", kernels), (
            "loads are not asynchronous, 16 bytes each"
        )
        assert any(name.startswith("wgmma") and name.endswith("bf16.bf16") for name in products)
    else:
        assert not any("mma" in name for name in products), "float32 went to the TF32 units"
