"""Attention without latents: weights, memory and cache, against the model and its memory."""

import dataclasses
import math

import pytest
from all_configs import load

from deepseek_jax.model.count import weights
from deepseek_jax.plan import attention_kinds as kinds
from deepseek_jax.plan import machine_lookup
from deepseek_jax.plan.memory import memory
from deepseek_jax.plan.update_time import update_seconds

V3 = load("v3_671b")


def changed(config, **sections):
    for section, values in sections.items():
        part = dataclasses.replace(getattr(config, section), **values)
        config = dataclasses.replace(config, **{section: part})
    return config


@pytest.mark.parametrize("name", ["v3_671b", "v2_lite_16b"])
def test_latent_weights_are_those_of_the_model(name):
    model = load(name).model
    found = sum(
        math.prod(weight.shape[1:])
        for weight in weights(model)
        if weight.path.startswith("moe_layers.attention.") and weight.roles is not None
    )
    assert kinds.attention_weights(model, "mla") == found


def test_other_weights_are_four_squares_or_less():
    assert kinds.attention_weights(V3.model, "mha") == 4 * 7168 * 16384
    assert kinds.attention_weights(V3.model, "gqa") == 2 * 7168 * 16384 + 2 * 7168 * 1024


SMALL = changed(
    V3,
    model=dict(layers=8, experts=8, groups=4, d_model=1024, heads=8, vocab=1024, d_expert=128),
    batch=dict(micro_sequences=64),
)


@pytest.mark.parametrize("recipe", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize(("pipe", "zero"), [(1, 0), (1, 1), (1, 3), (2, 1)])
def test_bytes_of_a_weight_are_those_of_the_memory(pipe, zero, recipe):
    """A wider latent adds weights of the same placement; its norm is less than 0.1 % of them."""
    config = changed(
        SMALL,
        mesh=dict(pipe=pipe, replica=2, node=2, gpu=2),
        layout=dict(zero=zero),
        precision=dict(recipe=recipe),
    )
    wider = changed(config, model=dict(kv_latent=config.model.kv_latent + 4096))
    added = kinds.attention_weights(wider.model, "mla") - kinds.attention_weights(
        config.model, "mla"
    )
    more, less, each = memory(wider), memory(config), kinds.bytes_per_weight(config)
    assert each.total * added == pytest.approx(more.total - less.total, rel=1e-3)
    for name in ("masters", "moments", "gradients"):
        grown = getattr(more, name) - getattr(less, name)
        assert getattr(each, name) * added == pytest.approx(grown, rel=1e-3)
    grown = more.compute_weights - less.compute_weights
    assert each.prepared * added == pytest.approx(grown, rel=2e-3)
    if zero < 3:
        machine = machine_lookup.find("h100")
        seconds = update_seconds(wider, machine) - update_seconds(config, machine)
        assert seconds > 0
        heads = update_seconds(config, machine, "mha") - update_seconds(config, machine)
        share = kinds.extra_weights(config, "mha") / added
        assert heads == pytest.approx(share * seconds, rel=2e-2)


def test_activations_of_heads_without_latents():
    """Queries, keys and values in 16 bits, less MLA's latents, for each live layer."""
    none, one = (kinds.extra_bytes(V3, "mha", live) for live in (0, 1))
    assert one - none == 2 * 4096 * (3 * 16384 - 1536 - 512 - 64)
    assert kinds.extra_bytes(V3, "mla", 17) == 0
    assert kinds.cache_bytes(V3.model, "mla") == 70_272
