"""Published settings that are unusual, and computed all the same."""

import math
from pathlib import Path

import numpy as np
import pytest
from equations import checkpoints, rotary

from deepseek_jax.checkpoint import conversion
from deepseek_jax.checkpoint.hf import config_json, neighbours
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import ConfigError
from deepseek_jax.model.rotary import attention_factor, frequencies

FILE = Path("folder/config.json")
PAGE = Path(__file__).parents[3] / "docs/neighbours.md"
YARN = {
    "type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64, "beta_fast": 1.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def config_of(**changes):
    return config_json.model_config(checkpoints.make("v3")[0] | changes, source=FILE)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "kimi_k2"},
        {"model_type": "kimi_k2", "topk_method": None, "scoring_func": None},
        {"architectures": None},
        {"architectures": []},
    ],
    ids=str,
)
def test_other_names_of_the_same_model(changes):
    assert config_of(**changes) == config_of()


@pytest.mark.parametrize("theta", [10_000.0, 50_000.0])
@pytest.mark.parametrize("width", [8, 64])
def test_a_ramp_between_equal_rotations(theta, width):
    """Kimi K2's YaRN: from floor to ceil of the one pair that turns once."""
    settings = checkpoints.make("v3")[0] | {
        "rope_scaling": YARN, "rope_theta": theta, "qk_rope_head_dim": width,
    }  # fmt: skip
    config = config_json.model_config(settings, source=FILE)
    low, high = rotary.correction_range(settings)
    assert high - low == 1
    np.testing.assert_allclose(frequencies(config), rotary.frequencies(settings), rtol=1e-12)
    plain = theta ** (-2 * np.arange(width // 2) / width)
    speeds = np.where(np.arange(width // 2) <= low, plain, plain / 32)
    np.testing.assert_allclose(frequencies(config), speeds, rtol=1e-12)


def test_yarn_without_an_original_length_takes_that_of_the_model():
    """As `transformers` does."""
    yarn = {key: value for key, value in YARN.items() if not key.startswith("original")}
    assert config_of(rope_scaling=yarn, max_position_embeddings=256).yarn_original == 256


def test_what_transformers_leaves_out_has_the_values_that_it_takes():
    settings = checkpoints.make("v3")[0]
    del settings["rope_theta"]
    settings |= {"num_key_value_heads": None, "rope_parameters": {"rope_type": "default"}}
    assert config_json.model_config(settings, source=FILE) == config_of()
    stated = {"attention_factor": 1.0} | YARN  # what equal mscales give
    ratio = {key: value for key, value in stated.items() if key != "factor"}
    for yarn in (stated, ratio):
        found = config_of(rope_scaling=yarn, max_position_embeddings=2048)
        assert found == config_of(rope_scaling=YARN, max_position_embeddings=2048)
    alone = {key: value for key, value in YARN.items() if key != "mscale"}
    found = config_of(rope_scaling=alone)  # the ratio of mscales is taken of two that are stated
    factor = attention_factor(found.yarn_factor, found.yarn_mscale, found.yarn_mscale_all_dim)
    assert factor == 0.1 * math.log(32) + 1


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"rope_scaling": YARN | {"attention_factor": 2}},
            r"attention_factor is 2; expected null, or 1 as factor and mscale give",
        ),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, r"beta_fast is 0.5; expected at least beta_"),
        ({"rope_scaling": YARN, "rope_theta": 1}, r"rope_theta is 1; expected another number"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps is 10{47}\.{3}0{8}; expected a number from"),
        ({"rms_norm_eps": 1e-320}, r"rms_norm_eps is 1e-320; expected a number from 1e-20 to 2"),
        ({"rope_theta": 1e-320}, r"rope_theta is 1e-320; expected a number from 1e-20 to 2"),
        ({"routed_scaling_factor": 1e38}, r"factor is 1e\+38; expected a number from 1e-20 to 2"),
        ({"rope_scaling": YARN | {"mscale": -1}}, r"mscale is -1; expected 0, or a number from"),
        ({"num_hidden_layers": [0] * 10**6}, r"num_hidden_layers is \[0, .{,80}; expected a whole"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; expected an object"),
        (
            {
                "quantization_config": {
                    "quant_method": "fp8", "weight_block_size": [128, 128], "ignore": "lm_head",
                }
            },
            "quantization_config.ignore is 'lm_head'; expected names of modules, or null",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_computed_is_refused_in_a_line(changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        config_of(**changes)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("kind", neighbours.NEIGHBOURS)
def test_a_model_of_another_family_is_refused_with_what_it_needs(kind):
    with pytest.raises(ConfigError, match=rf"json: model_type is '{kind}', another model: ") as got:
        config_of(model_type=kind)
    message = str(got.value)
    assert neighbours.NEIGHBOURS[kind] in message and len(message) < 300
    assert f"`{kind}`" in PAGE.read_text()


def test_unknown_keys_of_the_quantisation_are_kept_while_the_format_stays():
    given = {
        "quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0", "new": 1,
    }  # fmt: skip
    settings = checkpoints.make("v3")[0] | {"quantization_config": given}
    found = config_json.in_format(settings, "fp8")["quantization_config"]
    assert found == {**given, "activation_scheme": "dynamic", "fmt": "e4m3"}
    assert "quantization_config" not in config_json.in_format(settings, "bfloat16")


def test_values_of_v4_are_kept_and_told_apart(tmp_path):
    config = config_of(scoring_func="sqrtsoftplus", swiglu_limit=10.0)
    assert (config.score, config.swiglu_limit) == ("sqrtsoftplus", 10.0)
    written = config_json.published(config)
    assert (written["scoring_func"], written["swiglu_limit"]) == ("sqrtsoftplus", 10.0)
    assert "swiglu_limit" not in config_json.published(config_of())
    assert not config_json.understood_here_alone(config_json.published(config_of()))
    checkpoints.write(tmp_path / "in", *checkpoints.make("v4_values"))
    source = open_checkpoint(tmp_path / "in")
    with pytest.warns(UserWarning, match="has swiglu_limit and scoring_func, which other readers"):
        conversion.to_published(source, tmp_path / "out", "float32", 10**9)
    assert open_checkpoint(tmp_path / "out").model == source.model


def test_kinds_of_layers_decide_where_v32_lists_them():
    """As `transformers` does: it writes the list, and passes `first_k_dense_replace` over."""
    settings = checkpoints.make("v32")[0] | {"first_k_dense_replace": 9}
    for dense in range(4):
        kinds = ["dense"] * dense + ["sparse"] * (3 - dense)
        for more in ([], ["sparse"]):  # the list may hold MTP layers, too
            found = config_json.model_config(
                settings | {"mlp_layer_types": kinds + more}, source=FILE
            )
            assert found.dense_layers == dense and found.mtp_depth == 1
            listed = settings | {"mlp_layer_types": kinds}
            config_json.check_mtp(listed, found, FILE)  # nor is it asked for MTP layers


@pytest.mark.parametrize("kinds", ["dense", [], ["sparse", "dense", "sparse"], ["dense", 1, {}]])
def test_kinds_of_layers_in_another_order_are_refused(kinds):
    settings = checkpoints.make("v32")[0] | {"mlp_layer_types": kinds}
    with pytest.raises(ConfigError, match=r"mlp_layer_types is .*dense layers, then sparse ones"):
        config_json.model_config(settings, source=FILE)
