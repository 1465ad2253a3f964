"""Programs of `bench kernels` and `bench layer`, compiled for a virtual H100; nothing runs.

Each form of each case runs its computation in a loop, once in each trip; kernels spill nothing.
"""

import functools
import re

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.aot import cluster, compiled, products
from deepseek_jax.aot import layer as one_layer
from deepseek_jax.bench import kernel_case, kernels, layer, product_cases, v3_sizes
from deepseek_jax.bench.kernel_case import KERNEL, SEED
from deepseek_jax.config import MeshConfig
from deepseek_jax.kernels.kernel_names import ATTENTION, ATTENTION_PADDED, OUTER, PRODUCT, QUANTISE
from deepseek_jax.precision.fp8_hopper import HopperProducts

pytestmark = pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "")

TINY = configs.parse(v3_tiny.get_config())
V3 = v3_sizes.of_v3(TINY.model)
HOPPER = HopperProducts()
TIMES = 7


@functools.cache
def one_h100():
    return cluster.mesh(MeshConfig(pipe=1, replica=1, node=1, gpu=1, tensor=1))


@pytest.fixture
def h100():
    with jax.set_mesh(one_h100()):
        yield one_h100()


def placed(mesh, tree):
    place = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
    )


@pytest.fixture
def compile_form(h100, tmp_path, monkeypatch):
    """Compiles a form of a case -> text of the program, and what ptxas says of new kernels."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

    def run(case, name):
        form, seed = case.forms[name], placed(h100, SEED)
        operands = placed(h100, jax.eval_shape(kernel_case.drawn(case, [name]), seed))[name]
        out = placed(h100, jax.eval_shape(form, *operands))
        program = cluster.compile_for(kernel_case.repeated(form, TIMES).lower(out, operands))
        said = [path.read_text() for path in tmp_path.glob("*.ptxas")]
        return program.as_text(), said

    return run


def check(case, name, text, said):
    """One loop of known length, and in it the kernel once; nothing spilled, no operand copied."""
    assert re.findall(r'known_trip_count":{"n":"(\d+)"', text) == [str(TIMES)], str(case)
    for each in said:
        assert re.findall(r"(\d+) bytes spill", each) == ["0", "0"], str(case)
    (body,) = re.findall(r"body=%([\w.-]+)", text)
    lines = text.partition(f"\n%{body} (")[2].partition("\n}\n")[0]
    assert not re.search(r"= \w+\[\d[\d,]{6,}\]\S* copy\(", lines), str(case)
    if name != KERNEL:
        assert "mosaic_gpu" not in text and "__cudnn" not in text
        return
    call = "__cudnn" if case.check == ATTENTION else "mosaic_gpu_v2"
    assert lines.count(f'custom_call_target="{call}') == text.count(call) == 1, str(case)


def test_a_product_runs_once_in_each_trip(compile_form):
    layers = product_cases.linear_layers(V3, v3_sizes.LENGTH, v3_sizes.GROUP)
    w_dq = next(each for each in layers if each.name == "W^DQ")
    case = product_cases.of_layer(w_dq, HOPPER)[0]
    for name in case.forms:
        check(case, name, *compile_form(case, name))


def every_case():
    """All of a run on a GPU. JAX traces attention with padded values on a GPU alone."""
    found = kernels.cases(V3, v3_sizes.LENGTH, v3_sizes.GROUP, HOPPER)
    for pairs in (False, True):
        found += kernels.tiling_cases(V3, HOPPER, pairs=pairs)
    return [case for case in found if case.check != ATTENTION_PADDED]


PIECES = (
    *(
        f"{kind} {product}"
        for kind in ("linear", "experts")
        for product in ("forward", "input gradient", "weight gradient")
    ),
    *(f"quantise {what}" for what in ("rows", "tokens", "both", "blocks", "blocks and copy")),
    "attention forward", "attention backward", "latent attention", "tiling",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("piece", PIECES)
def test_every_program_of_a_run_compiles(compile_form, h100, piece):
    """With the program that draws the operands."""
    cases = every_case()
    assert {case.piece for case in cases} == set(PIECES)
    for case in cases:
        if case.piece == piece:
            cluster.compile_for(kernel_case.drawn(case, case.forms).lower(placed(h100, SEED)))
            for name in case.forms:
                check(case, name, *compile_form(case, name))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", layer.RECIPES)
@pytest.mark.parametrize("piece", ["attention sublayer", *layer.POLICIES])
def test_a_layer_of_each_recipe(recipe, piece):
    """V3's widths; FP8 with kernels has as many as a layer of `test_products.py`."""
    config = layer.of_recipe(layer.sized(TINY, wide=True), recipe)
    pieces = layer.pieces(one_h100())
    name = piece if piece in pieces else f"MoE layer, recompute {piece}"
    program = cluster.compile_for(pieces[name](config))
    read = compiled.read(program, one_h100(), one_layer.KERNELS)
    counts = products.kernel_counts(read.module)
    kept = {name: counts.get(name, 0) for name in (PRODUCT, OUTER, QUANTISE)}
    calls = sum("__cudnn$fmha" in gemm.op for gemm in read.gemms)
    linear = 5 if name == "attention sublayer" else 9
    if recipe == "fp8":
        # Recomputation of the whole layer multiplies once more what it does not keep.
        assert kept[OUTER] == linear and kept[PRODUCT] >= 2 * linear and kept[QUANTISE] > 0
    else:
        assert not any(kept.values())
    assert (calls >= 2) == ("portable" not in recipe)
    assert read.peak_bytes < 60 * 2**30
