"""Attention without latents: weights, memory and cache against the model and its memory."""

import dataclasses

import all_configs
import pytest

from deepseek_jax.model.count import weights
from deepseek_jax.plan import attention_kinds as kinds
from deepseek_jax.plan.memory import memory

V3, V2_LITE = all_configs.load("v3_671b"), all_configs.load("v2_lite_16b")


def changed(config, **sections):
    for section, values in sections.items():
        part = dataclasses.replace(getattr(config, section), **values)
        config = dataclasses.replace(config, **{section: part})
    return config


@pytest.mark.parametrize("config", [V3, V2_LITE], ids=["query latent", "plain queries"])
def test_the_weights_of_latent_attention_are_those_of_the_model(config):
    model = config.model
    found = sum(
        weight.size_of_layer if hasattr(weight, "size_of_layer") else _one_layer(weight.shape)
        for weight in weights(model)
        if weight.path.startswith("moe_layers.attention.") and weight.roles is not None
    )
    assert kinds.attention_weights(model, "mla") == found


def _one_layer(shape):
    size = 1
    for each in shape[1:]:
        size *= each
    return size
