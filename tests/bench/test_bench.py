"""Bench commands: refused arguments, and the claims that need no clock."""

import dataclasses
import importlib
import pathlib
import subprocess
import sys
import types
import typing

import jax
import numpy as np
import pytest

from configs import v3_671b, v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.bench import (
    NAMES,
    grouped,
    layer,
    load,
    measured_rates,
    memory,
    moe,
    tiles,
    v3_sizes,
)
from deepseek_jax.hardware import chips
from deepseek_jax.kernels import grouped_triton
from deepseek_jax.precision.grouped import reference

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no NAME given"),
        (("mo",), "there is no 'mo'; name one of train, profile, moe, memory,"),
        (("moe", "more"), "unexpected argument 'more'"),
    ],
)
def test_names(arguments, message):
    command = [sys.executable, "-m", "deepseek_jax.bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_each_result_can_be_printed():
    """`table.text` prints a dict."""
    for name in NAMES:
        measure = importlib.import_module(f"deepseek_jax.bench.{name}").measure
        assert typing.get_origin(typing.get_type_hints(measure)["return"]) is dict, name


@pytest.fixture(scope="module")
def tiny():
    return configs.parse(v3_tiny.get_config())


@pytest.mark.slow  # train/test_memory.py has the same for a smaller model
def test_no_set_of_logits_is_held_at_depth_four(tiny):
    def shallow(config):  # one dense layer: quick to compile, and all five heads are there
        model = dataclasses.replace(config.model, layers=1, dense_layers=1)
        return dataclasses.replace(config, model=model)

    def growth(chunk):
        small, large = (
            shallow(memory.with_sizes(tiny, mtp_depth=4, vocab=vocab, loss_chunk=chunk))
            for vocab in (2048, 16_384)
        )
        return memory.temp_bytes(large) - memory.temp_bytes(small)

    logits = 4 * 2048 * (16_384 - 2048)  # what one head's whole logits grow by
    assert growth(chunk=128) < logits
    assert growth(chunk=5 * 2048) > 4 * logits  # logits of all five heads at once would show


def test_moe_rows(tiny, monkeypatch):
    monkeypatch.setattr(moe, "EXPERTS", moe.EXPERTS[:2])
    rows = moe.measure(tiny, rounds=1)["layers"]
    assert [row["experts"] for row in rows] == [16, 32]
    assert rows[0]["ratio"] == 1 and all(row["seconds"] > 0 for row in rows)


def test_load_rows(tiny):
    found = load.measure(tiny, gigabytes=0.05, rounds=1)
    assert [row["onto"] for row in found["loads"]] == list(load.MESHES)
    for row in found["loads"]:
        assert row["of_cat"] == pytest.approx(row["seconds"] / found["cat_seconds"])
        assert row["beside_weights_GiB"] == pytest.approx(row["peak_GiB"] - found["checkpoint_GiB"])
    assert 0.1 < found["checkpoint_GiB"] < 0.2
    assert [row["to"] for row in found["converts"]] == ["a workdir", "a checkpoint"]
    for row in found["converts"]:
        assert row["of_largest_file"] == pytest.approx(row["peak_GiB"] / found["largest_file_GiB"])


def test_layer_rows(tiny, tmp_path, monkeypatch):
    """On a CPU, whose rates are far below those assumed for an H800; a policy fails."""
    of_all = layer.pieces

    def broken(config):
        return types.SimpleNamespace(compile=lambda options: 1 / 0)

    def few(mesh):
        sublayer = "attention sublayer"
        return {sublayer: of_all(mesh)[sublayer], "MoE layer, recompute full": broken}

    monkeypatch.setattr(layer, "pieces", few)
    said, file = [], tmp_path / "rates.json"
    found = layer.measure(tiny, calls=1, repeats=1, say=said.append, out=file)
    rows = [row for row in found["layer"] if "fault" not in row]
    recipes = "fp8 portable", "bfloat16 portable"
    names = "attention sublayer", "MoE layer, recompute full"
    assert [(row["piece"], row["recipe"]) for row in found["layer"]] == [
        (piece, recipe) for piece in names for recipe in recipes
    ]
    assert len(rows) == 2 and "ZeroDivisionError" in found["layer"][-1]["fault"]
    for row, line in zip(rows, said, strict=False):
        assert row["of_predicted"] == pytest.approx(row["milliseconds"] / row["predicted"])
        assert row["of_predicted"] > 1 and row["tflops_per_s"] > 0 and row["peak_GiB"] > 0
        assert row["of_portable"] is row["of_bfloat16"] is None and row["recipe"] in line
    assert found["peak_tflops_per_s"] is None and found["kernels"] == "portable"
    assert found["fp8_goal_reached"] is None
    rates = measured_rates.read(file, "out")[1]
    assert [(rate.piece, rate.recipe) for rate in rates] == [
        (row["piece"].replace(",", ""), row["recipe"]) for row in rows
    ]
    assert rates[0].shape == (tiny.batch.length, tiny.model.d_model) and rates[0].flops > 1e6


@pytest.mark.slow
def test_a_layer_of_both_recipes(tiny):
    found = layer.measure(tiny, calls=1, repeats=1)
    assert len(found["layer"]) == 6 and not any("fault" in row for row in found["layer"])


def test_a_layer_without_time(tiny):
    said = []
    found = layer.measure(tiny, say=said.append, budget=0)
    assert len(found["left_out"]) == 3 and not found["layer"]
    assert said == [f"no time was left for: {'; '.join(found['left_out'])}"]


def test_recipes_of_a_layer(tiny):
    """With kernels, and as the build before had them; BF16 is compared with what it compares to."""
    assert layer.RECIPES == {
        "fp8": ("fp8", "auto"),
        "bfloat16": ("bfloat16", "auto"),
        "fp8 portable": ("fp8", "portable"),
        "bfloat16 portable": ("bfloat16", "portable"),
    }
    precision = layer.of_recipe(layer.sized(tiny, wide=False), "fp8 portable").precision
    assert (precision.recipe, precision.kernels) == ("fp8", "portable")
    program = types.SimpleNamespace(gemms=[], peak_bytes=0)
    spent = {"fp8": 1.0, "bfloat16": 1.5, "fp8 portable": 4.0, "bfloat16 portable": 2.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer.cost_model, "costs", lambda *_: {})
        patch.setattr(layer.cost_model, "replay", lambda *_: types.SimpleNamespace(total=0.5))
        rows = {name: layer._row("x", name, spent, program) for name in spent}
    assert rows["fp8"]["of_portable"] == 0.25 and rows["fp8"]["of_bfloat16"] == pytest.approx(2 / 3)
    assert rows["bfloat16"]["of_portable"] == 0.75 and rows["fp8 portable"]["of_portable"] is None


def test_a_layer_gets_the_rows_of_v3(tiny):
    """8 choices of each of 4096 tokens, and weights of eight experts for them."""
    model = layer.sized(tiny, wide=True).model
    full = configs.parse(v3_671b.get_config()).model
    assert model.top_k == full.top_k == model.experts
    assert {name: getattr(model, name) for name in v3_sizes.LAYER} == v3_sizes.LAYER


@pytest.mark.parametrize(
    ("name", "flag", "words"),
    [
        ("memory", "--out=rates.json", "bench memory has no --out; leave it out"),
        ("kernels", "--budget=nan", "--budget=nan is no number of seconds"),
    ],
)
def test_flags_that_cannot_work(name, flag, words):
    command = [sys.executable, "-m", "deepseek_jax.bench", name, flag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, f"error: {words}\n")


def test_tiles_rows(tiny):
    tile = grouped_triton.Tile(height=16, width=16, depth=16, neighbours=2)
    case = grouped.MatmulCase("float32", (SHAPE,), calls=1)
    found = tiles.measure(tiny, case=case, tiles=[tile], rounds=1, interpret=True)
    ((row,),) = (v for v in found.values() if type(v) is list)
    assert row["height"] == 16 and all(row[name] > 0 for name in tiles.PRODUCTS)
    assert tiles.candidates()[0] == grouped_triton.BFLOAT16_TILE
    with pytest.raises(configs.ConfigError, match="kernels of a GPU, and this machine has none"):
        tiles.measure(tiny)


SHAPE = grouped.Shape(rows=48, experts=3, width=8, out=16)


def test_grouped_rows(tiny):
    case = grouped.MatmulCase("float32", (SHAPE,), calls=2)
    (rows,) = (v for v in grouped.measure(tiny, case=case, rounds=1).values() if type(v) is list)
    names = [(row["backend"], row["pass"], row["sizes"]) for row in rows]
    assert len(set(names)) == 2 + 2 * 2 * 3  # dense; shares and ragged_dot, three sizes each
    assert all(row["milliseconds"] > 0 and row["of_floor"] is None for row in rows)
    assert [row["of_dense"] for row in rows if row["backend"] == "dense"] == [1, 1]


@pytest.mark.parametrize("kind, sizes", [("balanced", [16, 16, 16]), ("one", [48, 0, 0])])
def test_grouped_backends_do_the_same(kind, sizes):
    rows, weight = jax.numpy.ones((48, 8)), jax.random.normal(jax.random.key(0), (3, 8, 16))
    given = SHAPE.sizes()[kind]
    np.testing.assert_array_equal(given, sizes)
    for name, fn in grouped.backends("cpu").items():
        if name != "dense" or kind == "one":  # dense is one expert for all rows
            np.testing.assert_allclose(
                fn(rows, weight, given), reference(rows, weight, given), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("shape", grouped.GPU.shapes, ids=["gate_up", "down"])
def test_grouped_on_a_gpu_adds_the_kernel(shape):
    """Traced only; `test_grouped_triton.py` tests the kernel's results."""
    shapes = ((shape.rows, shape.width), (shape.experts, shape.width, shape.out))
    operands = [jax.ShapeDtypeStruct(one, grouped.GPU.dtype) for one in shapes]
    found = grouped.backends("gpu")
    assert set(found) == {*grouped.backends("cpu"), "kernel"}
    for fn in found.values():
        for sizes in shape.sizes().values():
            out = jax.eval_shape(fn, *operands, sizes)
            assert out.shape == (shape.rows, shape.out) and out.dtype == "bfloat16"
            assert sizes.sum() == shape.rows and sizes.dtype == np.int32


def test_grouped_floor_is_that_of_the_chip():
    """Routed gate and up of V3 on one device: 1924 GFLOP, so 1945 us at 989.5 TFLOP/s."""
    shape = grouped.GPU.shapes[0]
    assert grouped._floor_seconds(shape, "bfloat16", chips.H100) == pytest.approx(1945e-6, rel=1e-3)
    thin = dataclasses.replace(shape, rows=32)  # reads 4 x 7168 x 4096 weights: memory-bound
    want = 2 * (4 * 7168 * 4096 + 32 * (7168 + 4096)) / 3.35e12
    assert grouped._floor_seconds(thin, "bfloat16", chips.H100) == pytest.approx(want)
