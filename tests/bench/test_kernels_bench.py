"""`bench kernels`: its sizes, its forms alike, its rows, and what it does without time or a GPU."""

import dataclasses
import json
import pathlib
import runpy
import subprocess
import sys
import types

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import v3_671b, v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.bench import (
    kernel_case,
    kernels,
    measured_rates,
    product_cases,
    quantiser_cases,
    v3_sizes,
)
from deepseek_jax.bench.kernel_case import BFLOAT16, KERNEL, PORTABLE, KernelCase
from deepseek_jax.bench.product_cases import LinearSizes
from deepseek_jax.hardware import chips
from deepseek_jax.precision.fp8_hopper import HopperProducts

ROOT = pathlib.Path(__file__).parents[2]
TINY = configs.parse(v3_tiny.get_config())


def test_sizes_are_those_of_v3():
    """4,096 tokens of a GPU, and a quarter of 256 experts' 32,768 rows for each of its four."""
    full = configs.parse(v3_671b.get_config()).model
    assert {name: getattr(full, name) for name in v3_sizes.MODEL} == v3_sizes.MODEL
    layers = product_cases.linear_layers(v3_sizes.of_v3(TINY.model), 4096, v3_sizes.GROUP)
    assert {layer.name: layer.shape for layer in layers} == {
        "W^O": (4096, 16_384, 7168),
        "experts, gate and up": (4, 32_768, 7168, 4096),
        "experts, down": (4, 32_768, 2048, 7168),
        "W^UQ": (4096, 1536, 24_576),
        "shared, gate and up": (4096, 7168, 4096),
        "shared, down": (4096, 2048, 7168),
        "W^UK and W^UV": (4096, 512, 32_768),
        "dense FFN, gate and up": (4096, 7168, 36_864),
        "dense FFN, down": (4096, 18_432, 7168),
        "W^DQ, W^DKV, W^KR joined": (4096, 7168, 2112),
        "W^DQ": (4096, 7168, 1536),
        "W^DKV and W^KR": (4096, 7168, 576),
    }
    (rows,) = layers[1].sizes()
    assert rows.sum() == 32_768 and abs(rows - 8192).max() < 200 and (rows % 128 != 0).all()


SMALL = LinearSizes("small", 256, 256, 128), LinearSizes("small, experts", 256, 256, 128, 2)


@pytest.mark.parametrize("layer", SMALL, ids=str)
def test_forms_of_a_product_are_alike(layer):
    """FP8 in the portable form against BF16: within the error of its tiles, 3 % of the norm."""
    for case in product_cases.of_layer(layer, HopperProducts()):
        assert case.flops == 2 * 256 * 256 * 128
        forms = PORTABLE, BFLOAT16
        operands = kernel_case.drawn(case, forms)(jnp.uint32(3))
        got, want = (
            np.asarray(jax.jit(case.forms[form])(*operands[form]), np.float64) for form in forms
        )
        assert np.linalg.norm(got - want) < 0.04 * np.linalg.norm(want), str(case)
        assert not np.array_equal(got, want)  # one of them is in FP8


@pytest.mark.parametrize(
    ("layer", "number"),
    [
        (SMALL[0], 0),
        *(
            pytest.param(layer, number, marks=pytest.mark.slow)
            for layer in SMALL
            for number in (range(1, 3) if layer is SMALL[0] else range(3))
        ),
    ],
)
def test_the_kernel_of_a_product_computes_its_portable_form(layer, number):
    """In JAX's interpreter: sums of 256 in another order, results rounded to BF16 at most once."""
    hopper = HopperProducts(sms=2, interpret=interpreted.GPU)
    case = product_cases.of_layer(layer, hopper)[number]
    operands = kernel_case.drawn(case, (KERNEL, PORTABLE))(jnp.uint32(3))
    got = interpreted.run(jax.jit(case.forms[KERNEL]), *operands[KERNEL])
    want = np.asarray(jax.jit(case.forms[PORTABLE])(*operands[PORTABLE]), np.float32)
    np.testing.assert_allclose(got.astype(np.float32), want, rtol=2.0**-7, atol=1e-3)


def case(**forms):
    """Adds 1 to 64 numbers; 3.3 ns of memory traffic by the chip below."""
    found = {form: forms.get(form, lambda x: x + 1) for form in (KERNEL, BFLOAT16, PORTABLE)}

    def draw(seed):
        return dict.fromkeys(found, (kernel_case.numbers(seed, (64,), jnp.float32),))

    return KernelCase("sum", "x", (64,), "check", draw, found, 512, flops=64, goal=1e-9)


def test_a_row_has_rate_floor_and_goal():
    chip = dataclasses.replace(chips.H100, hbm_bytes_per_s=512e3)  # so that the floor is 1 ms
    row = kernel_case.measured(case(), {}, chip, rounds=2)
    assert row["floor_microseconds"] == pytest.approx(1000)
    assert row["of_floor"] == pytest.approx(1000 / row["microseconds"])
    assert row["rate"] == pytest.approx(64 / row["microseconds"] / 1e6)
    assert row["bfloat16_microseconds"] > 0 and row["portable_microseconds"] > 0
    assert row["unit"] == "TFLOP/s" and row["reached"] and row["faults"] == {}
    assert "0, reached" in kernel_case.line(row)
    missed = dataclasses.replace(case(), goal=1e9, by_bytes=True)
    row = kernel_case.measured(missed, {}, chip, rounds=1)
    assert row["reached"] is False and row["unit"] == "TB/s"
    assert row["rate"] == pytest.approx(512 / row["microseconds"] / 1e6)


def test_the_goal_of_a_quantiser_is_a_share_of_memory_speed():
    share = dataclasses.replace(case(), goal=0.8, flops=0)
    row = kernel_case.measured(share, {}, chips.H100, rounds=1)
    assert row["goal"] == pytest.approx(0.8 * 3.35) and row["unit"] == "TB/s"
    assert kernel_case.measured(share, {}, None, rounds=1)["goal"] is None


def test_a_refused_kernel_and_one_that_raises_leave_the_others():
    def broken(x):
        raise NotImplementedError("no such\nshape")

    row = kernel_case.measured(case(), {"check": "2 numbers are wrong"}, None, rounds=1)
    assert row["faults"] == {KERNEL: "2 numbers are wrong"} and row["rate"] is None
    assert kernel_case.line(row).endswith("; kernel: 2 numbers are wrong")
    found = kernel_case.measured(case(kernel=broken), {}, None, rounds=1)
    assert found["faults"] == {KERNEL: "NotImplementedError: no such shape"}
    for each in (row, found):
        assert each["microseconds"] is None and each["reached"] is None
        assert each["portable_microseconds"] > 0 and each["bfloat16_microseconds"] > 0


def test_all_runs_are_made():
    """Of a form in a loop: counted by a callback that the loop makes in each of them."""
    seen = []

    def counted(x):
        jax.debug.callback(lambda: seen.append(1))
        return x + 1

    out = kernel_case.repeated(counted, 5)(jnp.zeros(4), (jnp.arange(4.0),))
    jax.effects_barrier()
    np.testing.assert_array_equal(out, [1, 2, 3, 4])
    assert len(seen) == 5


def test_on_a_cpu_portable_forms_are_measured(monkeypatch, tmp_path):
    """Said in the first line. A file of rates is continued, and one of something else refused."""
    layer = LinearSizes("w", 64, 128, 128)
    quantiser = quantiser_cases.cases(TINY.model, 64, LinearSizes("e", 64, 96, 128, 2))[1]
    chosen = [product_cases.of_layer(layer, HopperProducts())[0], quantiser]
    monkeypatch.setattr(kernels, "small_cases", lambda model: chosen)
    said, file = [], tmp_path / "rates.json"
    found = kernels.measure(TINY, say=said.append, out=file, rounds=1)
    assert "this machine has no GPU" in said[0] and len(said) == 2 + len(chosen)
    assert not found["checks"] and found["rows_with_faults"] == 0 == found["goals"]
    for row in found["rows"]:
        assert row["portable_microseconds"] > 0 and row["microseconds"] is row["rate"] is None
    assert json.loads(json.dumps(found)) == found
    device, rates = measured_rates.read(file, "out")
    assert device == jax.devices()[0].device_kind
    assert [rate.key for rate in rates] == [
        ("linear forward", "fp8 portable", (64, 128, 128)),
        ("linear forward", "bfloat16", (64, 128, 128)),
        ("quantise rows", "fp8 portable", (64, 96)),
    ]
    assert rates[0].flops == 2 * 64 * 128 * 128 and rates[0].seconds > 0
    # x and w in FP8, their scales, and the product in BF16.
    assert rates[0].bytes == 64 * 128 + 128 * 128 + 4 * (64 + 1) + 2 * 64 * 128
    measured_rates.RateFile(file, device).add([dataclasses.replace(rates[0], recipe="other")])
    assert len(measured_rates.read(file, "out")[1]) == 4
    measured_rates.RateFile(file, "another")
    assert measured_rates.read(file, "out") == ("another", [])
    file.write_text("[]")
    with pytest.raises(configs.ConfigError, match="no file of measured rates; give another name"):
        measured_rates.RateFile(file, "another")


def test_without_time_every_row_is_named():
    said = []
    found = kernels.measure(TINY, say=said.append, budget=0)
    names = [str(each) for each in kernels.small_cases(TINY.model)]
    assert found["left_out"] == names and found["rows_left_out"] == len(names) and not found["rows"]
    assert said[-1] == f"no time was left for: {'; '.join(names)}"


def test_the_order_of_a_run_on_a_gpu(monkeypatch):
    """Checks, rows, PyTorch, tilings; then the check of pairs, and pairs: refused on this GPU."""
    device = types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="8.0"
    )
    monkeypatch.setattr(kernels.jax, "devices", lambda: [device])
    one = case()
    monkeypatch.setattr(kernels, "cases", lambda *_: [dataclasses.replace(one, check="attention")])
    monkeypatch.setattr(
        kernels,
        "tiling_cases",
        lambda *_, pairs: [
            one.only(f"pairs {pairs}", one.forms[KERNEL], kernels.PAIRS if pairs else "right")
        ],
    )
    said = []
    found = kernels.measure(TINY, say=said.append, rounds=1)
    checks = [row["kernel"] for row in found["checks"]]
    assert checks == [*kernels.all_checks(), kernels.PAIRS]
    assert all("needs compute capability 9.x" in row["result"] for row in found["checks"])
    first, second, third = found["rows"]
    assert KERNEL in first["faults"] and not second["faults"] and KERNEL in third["faults"]
    assert second["microseconds"] > 0 and second["name"] == "pairs False"
    torch, pairs = (
        next(i for i, line in enumerate(said) if word in line) for word in ("torch", kernels.PAIRS)
    )
    assert said.index(kernel_case.HEADER) < torch < pairs and pairs == len(said) - 2
    assert (
        found["kernels_refused"] == len(checks) and found["goals"] == 1
    )  # of the row that was measured


TORCH = '''
"""As much of PyTorch as the script calls; a product of 100 columns fails."""
float8_e4m3fn = bfloat16 = float32 = None


class Array:
    def __init__(self, *shape): self.shape = shape
    def to(self, dtype): return self
    def t(self): return Array(*self.shape[::-1])


def randn(*shape, device): return Array(*shape)
ones = randn


def _scaled_mm(left, right, left_scales, right_scales, *, out_dtype, use_fast_accum):
    (m, k), (_, n) = left.shape, right.shape
    assert left_scales.shape == (m, k // 128), left_scales.shape
    assert right_scales.shape in ((k // 128, n), (k // 128, n // 128)), right_scales.shape
    if n == 100: raise RuntimeError("no\\nalgorithm")


class cuda:
    def synchronize(): pass
'''


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        (TORCH, {"b": "RuntimeError: no algorithm"}),
        ("raise OSError('libcuda is missing')", {"the rest": "libcuda is missing"}),
    ],
)
def test_torch_is_a_process_of_its_own(tmp_path, monkeypatch, source, faults):
    (tmp_path / "torch.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wanted = [("product", "a", 256, 128, 512), ("outer", "b", 256, 100, 512)]
    rows = {row["name"]: row for row in kernels.run_torch(wanted, 60)}
    assert {name for name, row in rows.items() if "fault" in row} == set(faults)
    for name, fault in faults.items():
        assert fault in rows[name]["fault"]
    if "a" in rows:
        flops = 2 * 256 * 128 * 512
        assert rows["a"]["tflops_per_s"] == pytest.approx(flops / rows["a"]["microseconds"] / 1e6)


def test_torch_gets_the_sizes_that_its_scales_take():
    layers = product_cases.linear_layers(v3_sizes.of_v3(TINY.model), 4096, v3_sizes.GROUP)
    shapes = kernels.torch_shapes(layers)
    assert ("product", "W^O, forward", 4096, 7168, 16_384) in shapes
    assert ("outer", "W^O, weight gradient", 16_384, 7168, 4096) in shapes
    assert not any("experts" in name or "joined" in name for _, name, *_ in shapes)
    assert all(contracted % 512 == 0 for *_, contracted in shapes)


def test_the_script_for_a_gpu_ends_without_one_and_names_faults(tmp_path):
    script = ROOT / "tests/gpu/settle.py"
    command = [sys.executable, str(script), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "no Hopper GPU: cpu\n")
    assert not (tmp_path / "out").exists()
    settle = runpy.run_path(str(script))
    assert sum(limit for _, limit in settle["TIMES"].values()) < 600
    row = kernel_case.measured(case(), {"check": "wrong"}, None, rounds=1)
    result = {"left_out": ["y"], "checks": [{"kernel": "k", "result": "refused: z"}], "rows": [row]}
    assert settle["faults_of"]("kernels", result) == [
        "kernels: no time was left for y",
        "check of k: refused: z",
        "sum, x, kernel: wrong",
    ]
    failed = {"piece": "p", "recipe": "fp8", "fault": "f"}
    result = {"left_out": [], "kernels_refused": {"k": "z"}, "layer": [{"piece": "q"}, failed]}
    assert settle["faults_of"]("layer", result) == ["kernel k: z", "p, fp8: f"]
