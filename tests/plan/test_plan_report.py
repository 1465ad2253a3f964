"""The command: golden numbers, formulas, keys, and errors."""

import json
import pathlib
import subprocess
import sys

import pytest

from deepseek_jax.plan import report
from deepseek_jax.plan.cache import cache_bytes_per_token
from deepseek_jax.plan.flops import training_flops_per_token
from tests.equations import cost
from tests.test_configs import NAMES, load, settings

ROOT = pathlib.Path(__file__).parents[2]


def plan(*arguments):
    command = [sys.executable, "-m", "deepseek_jax.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def full():
    done = plan("--config=configs/v3_671b.py", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_published_model(full):
    assert full["parameters"] == {
        "total": 671_026_419_200,
        "activated": 37_552_297_472,
        "activated_without_input_table": 36_625_618_432,
        "mtp": 11_610_068_224,
    }
    flops = full["flops_per_token"]
    assert round(flops["training_causal"] / 1e9, 1) == 250.5
    assert round(flops["training_full"] / 1e9, 1) == 281.2
    cache = full["cache_bytes_per_token"]
    assert cache == {"mla": 70_272, "mha": 3_997_696, "gqa": 249_856, "gqa_heads": 8}


def test_keys_of_the_json(full):
    assert list(full) == [
        "parameters",
        "flops_per_token",
        "cache_bytes_per_token",
        "layout",
        "bytes_per_device",
    ]
    each = full["bytes_per_device"]
    assert each["state"] == sum(
        each[key] for key in ("masters", "router_bias", "moments", "counters")
    )
    held = ("state", "compute_weights", "gathered_layer", "gradients", "reduced_gradients")
    assert each["total"] == sum(each[key] for key in held)
    assert full["layout"]["devices"] == 2048


@pytest.mark.parametrize("name", NAMES)
def test_operations_and_cache_follow_the_formulas(name):
    config = load(name)
    model, length, published = config.model, config.batch.length, settings(config.model)
    for causal in (True, False):
        want = cost.training_flops_per_token(published, length, causal=causal)
        assert training_flops_per_token(model, length, causal=causal) == want
    got = cache_bytes_per_token(model)
    assert got.mla == cost.cache_bytes_per_token(published)
    plain = (cost.grouped_cache_bytes_per_token(model.layers, g, model.d_value)
             for g in (model.heads, got.gqa_heads))  # fmt: skip
    assert (got.mha, got.gqa) == tuple(plain)


def test_devices_fill_the_free_axis():
    planned = report.plan(load("v3_tiny"), devices=4)
    assert planned["layout"]["mesh"]["gpu"] == 4
    assert report.plan(load("v3_tiny"))["layout"]["devices"] == 1


def test_text_shows_every_number():
    planned = report.plan(load("v3_16b"))
    shown = report.text(planned)
    for section in ("parameters", "bytes_per_device"):
        for key, value in planned[section].items():
            assert f"{value:,}" in shown, key
    assert "comes later" not in shown
    assert "comes later" in report.text(report.plan(load("v3_671b")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no config"),
        (("--config=configs/v3_tiny.py", "--devices=3"), "batch.micro_sequences=8"),
        (("--config=configs/v3_16b.py", "--devices=4"), "needs 8 devices"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = plan(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr
