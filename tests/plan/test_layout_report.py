"""`plan`: golden numbers, formulas, keys and errors."""

import dataclasses
import json
import pathlib

import pytest
from all_configs import NAMES, load, settings
from equations import cost

from deepseek_jax.model.flops import training_flops_per_token
from deepseek_jax.plan import layout_report
from deepseek_jax.plan.kv_cache import cache_bytes_per_token

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def full(typed):
    code, out, err = typed("plan.__main__", f"--config={ROOT / 'configs/v3_671b.py'}", "--json")
    assert code == 0, err
    return json.loads(out)


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
        "memory",
        "fits",
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
    planned = layout_report.plan(load("v3_tiny"), devices=4)
    assert planned["layout"]["mesh"]["gpu"] == 4
    assert layout_report.plan(load("v3_tiny"))["layout"]["devices"] == 1


@pytest.mark.parametrize("name", ["v3_16b", "v3_671b"])
def test_text_shows_every_number(name):
    planned = layout_report.plan(load(name))
    shown = layout_report.text(planned)
    for section in ("parameters", "bytes_per_device"):
        for key, value in planned[section].items():
            assert f"{value:,}" in shown, key
    assert ("Stages: " in shown) == (name == "v3_671b")


def test_bytes_of_the_published_model(full):
    """By hand: slots and ends on every one of 2,048 devices, which has 4 of 256 experts.

    It has an eighth of the vocabulary and of dense layers, and all else whole. A rank's eight slots
    fetch a dense layer's wide network each; three of them sum its gradients, as three layers are
    dense, all in one chunk of the end ranks, and what a chunk's slot has on one rank it has on all.
    """
    expert, wide, bias = 3 * 7168 * 2048, 3 * 7168 * 18_432 // 8, 256
    matrices = 187_105_280 + (4 + 1) * expert  # FP8: attention, routed and shared experts
    float32 = 2 * 7168 + 1536 + 512 + 7168 * 256  # norms and the router
    tables, norm = 2 * 129_280 // 8 * 7168, 7168
    mtp, mtp_norms = matrices + 2 * 7168 * 7168, float32 + 3 * 7168
    each = full["bytes_per_device"]
    blocks = 12 * (56 + 192) + 56 * 5 + 4 * 256 + 128 * 56 + 5 * 3 * 56 * 16  # of the matrices
    wide_blocks, joined_blocks = 3 * 56 * 18, 112 * 56
    slots = 8 * (matrices + wide + 4 * (blocks + wide_blocks + float32 + bias))
    ends = 2 * tables + mtp + 4 * (blocks + joined_blocks + norm + mtp_norms)
    assert each["compute_weights"] == slots + ends
    slots = 8 * (matrices + float32 + bias) + 3 * wide
    assert each["gradients"] == 4 * (slots + tables + norm + mtp + mtp_norms + bias)
    assert each["moments"] == each["masters"] == each["reduced_gradients"] == each["ema_host"]
    assert full["layout"]["stage_layers"] == [4] * 15 + [1]
    assert full["layout"]["empty_slots"] == 3


@pytest.mark.parametrize(
    ("pipeline", "pipe", "given", "line"),
    [
        ("dualpipe", 16, (), "Stages: 15 x 4 layers, 1 x 1; DualPipe: each rank holds two."),
        ("dualpipev", 16, (), "Stages: 30 x 2 layers, 1 x 1, 1 x 0; DualPipeV: each rank holds"),
        ("1f1b", 16, (), "Stages: 15 x 4 layers, 1 x 1; 1F1B: each rank holds one."),
        ("dualpipe", 4, (16, 16, 16, 13), "Stages: 3 x 16 layers, 1 x 13; DualPipe"),
    ],
)
def test_the_stages_are_told(pipeline, pipe, given, line):
    config = load("v3_671b")
    config = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, pipe=pipe),
        layout=dataclasses.replace(config.layout, pipeline=pipeline, stage_layers=given),
    )
    shown = layout_report.text(layout_report.plan(config))
    assert line in shown and "3 of 64 layer slots are empty" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no config"),
        ((f"--config={ROOT}/configs/v3_tiny.py", "--devices=3"), "batch.micro_sequences=8"),
        ((f"--config={ROOT}/configs/v3_16b.py", "--devices=4"), "needs 8 devices"),
    ],
)
def test_bad_input_is_one_line(arguments, message, typed):
    code, out, err = typed("plan.__main__", *arguments)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
