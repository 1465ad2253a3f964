"""Experts in the stacked form of transformers 5: gate rows before up rows, [E, 2F, D]."""

import dataclasses
import re

import ml_dtypes
import numpy as np
import pytest
from equations import checkpoints
from safetensors.numpy import save_file

from deepseek_jax.checkpoint.hf import config_json, safetensors, stacked
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import ConfigError

PREFIX = "model.layers.1.mlp.experts."


def stack(weights):
    """The same weights with the experts of each layer in two tensors."""
    out, layers = {}, {}
    for name, value in weights.items():
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name):
            layers.setdefault(found[1], {})[int(found[2]), found[3]] = value
        else:
            out[name] = value
    for own, parts in layers.items():
        count = 1 + max(number for number, _ in parts)
        halves = [np.concatenate([parts[e, "gate"], parts[e, "up"]]) for e in range(count)]
        out[f"{own}.gate_up_proj"] = np.stack(halves)
        out[f"{own}.down_proj"] = np.stack([parts[e, "down"] for e in range(count)])
    return out


def test_every_expert_is_found_in_the_stack(tmp_path):
    settings, weights = checkpoints.make("mtp")
    checkpoints.write(tmp_path, settings, stack(weights))
    found = open_checkpoint(tmp_path).published
    assert found.tensors.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(found.read(name), value)


def turned(weights):
    stacks = stack(weights)
    name = f"{PREFIX}gate_up_proj"
    return stacks | {name: np.ascontiguousarray(stacks[name].swapaxes(1, 2))}


def one_expert_less(weights):
    stacks = stack(weights)
    return stacks | {f"{PREFIX}down_proj": stacks[f"{PREFIX}down_proj"][1:]}


def blocks_of_two_matrices(weights):
    stacks = stack(weights)
    name = f"{PREFIX}gate_up_proj"
    return stacks | {
        name: stacks[name].astype(ml_dtypes.float8_e4m3fn),
        f"{name}_scale_inv": np.ones((16, 1, 1), np.float32),
    }


@pytest.mark.parametrize(
    "change, words",
    [
        (turned, r"gate_up_proj \(found float32\[16, 48, 48\]"),
        (one_expert_less, r"down_proj \(found float32\[15, 48, 24\], expected \[16, 48, 24\]: exp"),
        (blocks_of_two_matrices, "moe_intermediate_size=24 is no multiple of 128; expected one"),
    ],
)
def test_other_stacks_are_named(change, words, tmp_path):
    settings, weights = checkpoints.make("v3")
    if change is turned:  # where the two forms can be told apart
        settings |= {"moe_intermediate_size": 20}
        weights = {n: np.zeros(s, np.float32) for n, s in checkpoints.shapes(settings)}
        words = r"gate_up_proj \(found float32\[16, 48, 40\], expected \[16, 40, 48\]: experts"
    checkpoints.write(tmp_path, settings, change(weights))
    with pytest.raises(ConfigError, match=words):
        open_checkpoint(tmp_path)


def test_scales_are_cut_with_their_matrices(tmp_path):
    """Two experts of width 128: the first row of blocks is the gate's, the second the other's."""
    values = np.arange(2 * 256 * 136, dtype=np.float32).reshape(2, 256, 136)
    scales = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    name = f"{PREFIX}gate_up_proj"
    save_file({name: values, f"{name}_scale_inv": scales}, tmp_path / "model.safetensors")
    config = config_json.model_config(checkpoints.make("v3")[0], source=tmp_path)
    config = dataclasses.replace(config, experts=2, d_expert=128, d_model=136)
    found = stacked.single_experts(tmp_path, config, safetensors.open_folder(tmp_path))
    assert len(found) == 8
    for expert in range(2):
        for half, kind in enumerate(("gate", "up")):
            own = f"{PREFIX}{expert}.{kind}_proj.weight"
            rows = slice(128 * half, 128 * half + 128)
            np.testing.assert_array_equal(found[own].array, values[expert, rows])
            blocks = scales[expert, half : half + 1]
            np.testing.assert_array_equal(found[f"{own}_scale_inv"].array, blocks)
