"""Scales of FP8 blocks that are powers of two (V3.1): read and written, kept to the bit."""

import json

import numpy as np
import pytest
import small
from equations import checkpoints
from same_bytes import assert_same_bytes, tensors_of

from deepseek_jax.checkpoint import carried, conversion, load
from deepseek_jax.checkpoint.hf import fp8_blocks, names, safetensors
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.precision.fp8_tiles import E4M3, spread

EXPERT = "model.layers.2.mlp.experts.7.up_proj.weight"
ANY = 10**9  # bytes of a file


@pytest.fixture(scope="module")
def powers():
    """(settings, tensors) with scales of powers of two, one block's largest value stored as 224."""
    settings, stored, _ = checkpoints.make_fp8(released=True)
    settings["quantization_config"] |= {"scale_fmt": "ue8m0"}
    for name in [name for name in stored if name.endswith(names.SCALE)]:
        stored[name] = np.exp2(np.round(np.log2(stored[name]))).astype(np.float32)
    limited = np.clip(stored[EXPERT].astype(np.float32), -224, 224)  # nothing needs 448
    stored[EXPERT] = limited.astype(E4M3)
    return settings, stored


def in_e8m0(tensors):
    return {
        name: value.astype(safetensors.E8M0) if name.endswith(names.SCALE) else value
        for name, value in tensors.items()
    }


def by_way_of_a_workdir(folder, scales="kept"):
    conversion.to_run(open_checkpoint(folder / "in"), folder / "run", small.config())
    run = open_checkpoint(folder / "run")
    conversion.to_published(run, folder / "out", "fp8", ANY, scales=scales)
    return tensors_of(folder / "out")


def scale_format(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"].get("scale_fmt")


@pytest.mark.parametrize("dtype", ["F32", "F8_E8M0"])
def test_powers_of_two_come_back_to_the_bit(dtype, powers, tmp_path):
    settings, stored = powers
    narrow = dtype == "F8_E8M0"
    given = in_e8m0(stored) if narrow else stored
    checkpoints.write(tmp_path / "in", settings, given)
    got = by_way_of_a_workdir(tmp_path, "e8m0" if narrow else "kept")
    assert_same_bytes(got, given)
    assert scale_format(tmp_path / "out") == "ue8m0"
    assert (tmp_path / "run" / carried.KEPT / carried.SCALES).is_file()
    assert "scales.safetensors" not in {path.name for path in (tmp_path / "out").iterdir()}


def test_products_alone_do_not_tell_a_scale_from_its_half(powers):
    """224 times s is 448 times s / 2; scales that were kept decide, where they still fit."""
    values, scales = powers[1][EXPERT], powers[1][EXPERT + names.SCALE]
    products = values.astype(np.float32) * spread(scales, values.shape)
    guessed = fp8_blocks.quantise_blocks(products, powers_of_two=True)
    assert (guessed[1] < scales).any()
    known = fp8_blocks.quantise_blocks(products, powers_of_two=True, former=scales)
    assert known[0].tobytes() == values.tobytes() and (known[1] == scales).all()
    trained = products + np.float32(1e-3)
    fresh = fp8_blocks.quantise_blocks(trained, powers_of_two=True)
    stale = fp8_blocks.quantise_blocks(trained, powers_of_two=True, former=scales)
    assert stale[0].tobytes() == fresh[0].tobytes() and (stale[1] == fresh[1]).all()
    for bad in (np.nan, 0, -1, np.inf, 3):
        useless = np.full_like(scales, bad)
        again = fp8_blocks.quantise_blocks(products, powers_of_two=True, former=useless)
        assert again[0].tobytes() == guessed[0].tobytes() and (again[1] == guessed[1]).all()


def test_scales_of_any_value_come_back_to_the_bit(tmp_path):
    settings, stored, _ = checkpoints.make_fp8()
    checkpoints.write(tmp_path / "in", settings, stored)
    got = by_way_of_a_workdir(tmp_path)
    for name in stored:
        if name.endswith(names.SCALE):
            weight = name.removesuffix(names.SCALE)
            assert got[weight].tobytes() == stored[weight].tobytes(), weight
            assert got[name].tobytes() == stored[name].tobytes(), name


@pytest.mark.parametrize("scales", ["power_of_two", "e8m0"])
def test_powers_of_two_are_written_on_request(scales, tmp_path):
    settings, stored, exact = checkpoints.make_fp8()
    checkpoints.write(tmp_path / "in", settings, stored)
    source = open_checkpoint(tmp_path / "in")
    count = sum(name.endswith(names.SCALE) for name in stored)
    with pytest.warns(UserWarning, match=rf"{count} FP8 tensors .* quantised again, model\.layers"):
        conversion.to_published(source, tmp_path / "out", "fp8", ANY, scales=scales)
    assert scale_format(tmp_path / "out") == "ue8m0" and scale_format(tmp_path / "in") is None
    got = tensors_of(tmp_path / "out")
    for name in stored:
        if name.endswith(names.SCALE):
            assert got[name].dtype == (safetensors.E8M0 if scales == "e8m0" else np.float32)
            factors = got[name].astype(np.float32)
            assert fp8_blocks.are_powers_of_two(factors).all()
            weight = name.removesuffix(names.SCALE)
            wide = spread(factors, got[weight].shape)
            error = np.abs(got[weight].astype(np.float32) * wide - exact[weight])
            assert (error <= np.abs(exact[weight]) / 16 + wide / 1024).all(), weight
    load.load(tmp_path / "out")


def test_least_scale_is_a_normal_number():
    tiny = np.full((4, 4), 1e-38, np.float32)
    values, scales = fp8_blocks.quantise_blocks(tiny, powers_of_two=True)
    assert scales[0, 0] == 2.0**-126 and np.isfinite(values.astype(np.float32)).all()
    assert scales.astype(safetensors.E8M0).astype(np.float32) == scales
