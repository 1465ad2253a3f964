"""Bytes that a layer of V3 keeps for backward, from shapes."""

import pytest

from configs import v3_671b
from deepseek_jax import config as configs
from deepseek_jax.bench import residuals


def kept(recipe, dispatch, recompute="report"):
    config = v3_671b.get_config()
    config.layout.recompute = recompute
    config.precision.update(recipe=recipe, dispatch=dispatch)
    config.mesh.update(pipe=1, replica=1, node=1, gpu=1)
    found = residuals.kept_bytes(configs.parse(config))
    assert found["scores"] == 0
    return found["kept"] / 4096


@pytest.mark.parametrize("dispatch", ["compute", "fp8"])
def test_fp8_keeps_a_byte_and_a_scale_for_each_number(dispatch):
    """SwiGLU's inputs of 8 copies of a token and of the token in E4M3, heads in E5M6; else BF16."""
    scale = 1 / 128
    swiglu, heads = 8 * 4096 + 4096, 128 * 128
    bfloat16, fp8 = kept("bfloat16", dispatch), kept("fp8", dispatch)
    assert bfloat16 - fp8 == swiglu * (2 - 1 - scale) + heads * (2 - 1.5 - scale)


def test_the_published_model_in_fp8_keeps_half_of_bfloat16_or_less():
    """BF16 with the report's recomputation, and FP8 with that of the config."""
    policy = v3_671b.get_config().layout.recompute
    assert kept("fp8", "fp8", policy) <= kept("bfloat16", "compute") / 2
