"""A published checkpoint without a config file: the stated dtype, and a layout for any mesh."""

import warnings
from pathlib import Path

import pytest
from equations import checkpoints

from configs import moonlight_16b, v2_lite_16b, v3_671b
from deepseek_jax import config as configs
from deepseek_jax.checkpoint.hf import config_json, inference
from deepseek_jax.parallel import mesh as meshes

FILE = Path("folder/config.json")


@pytest.mark.parametrize(
    "settings, recipe",
    [
        ({"torch_dtype": "float32"}, "float32"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float32", "quantization_config": {"quant_method": "fp8"}}, "bfloat16"),
    ],
)
def test_the_stated_dtype_is_computed_in(settings, recipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inference.stated_recipe(settings, FILE) == recipe


def test_scales_are_those_that_the_blocks_state():
    assert inference.stated_scales({}) == "free"
    for form, scales in (({}, "free"), ({"scale_fmt": "ue8m0"}, "power_of_two")):
        settings = {"quantization_config": {"quant_method": "fp8", **form}}
        assert inference.stated_scales(settings) == scales


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, "folder/config.json states no dtype; computing in float32"),
        ({"torch_dtype": None}, "states no dtype"),
        ({"torch_dtype": "float16"}, "states dtype 'float16'; computing in float32"),
        ({"dtype": 16}, "states dtype 16; computing in float32"),
    ],
)
def test_other_dtypes_are_computed_in_float32_with_a_warning(settings, words):
    with pytest.warns(UserWarning, match=words):
        assert inference.stated_recipe(settings, FILE) == "float32"


@pytest.mark.parametrize("mesh", [{}, {"gpu": 8}, {"node": 2, "gpu": 2, "tensor": 2}], ids=str)
def test_the_config_fits_every_model_on_every_mesh(mesh):
    models = [config_json.model_config(checkpoints.make(v)[0], source=FILE) for v in ("v3", "mtp")]
    models += [configs.parse(m.get_config()).model for m in (v3_671b, v2_lite_16b, moonlight_16b)]
    for model in models:
        config = inference.inference_config(model, "bfloat16", "free")
        configs.check(config)
        found = meshes.forward_config(config, mesh, 64)
        assert found.model == model and found.precision.recipe == "bfloat16"
        assert found.precision.dispatch == "compute" and found.layout.recompute == "none"
