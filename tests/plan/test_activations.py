"""Bytes that a layer keeps for backward: the closed form equals the trace, and grows as it must."""

import dataclasses

import pytest

from configs import v3_671b, v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.plan import activations, residual_trace

EIGHT = dict(node=2, gpu=2, tensor=2)
STAGED = dict(pipe=2, node=2, gpu=2)

TWO_FULL, TWO_FLAT = "full, two in flight", "attention, two in flight, flat"

# recompute policy, recipe, payload, mesh and other values of the layout
CASES = {
    "report, one device": ("report", "float32", "compute", dict(gpu=1), {}),
    "attention, fp8, two hops": ("attention", "fp8", "fp8", EIGHT, {}),
    "report, bf16, flat": ("report", "bfloat16", "fp8", EIGHT, dict(dispatch="flat")),
    "full": ("full", "bfloat16", "compute", EIGHT, {}),
    "report, fp8, two in flight": (
        "report", "fp8", "fp8", EIGHT, dict(micro_batches_in_flight=2, capacity_factor=1.25),
    ),
    TWO_FLAT: (
        "attention", "bfloat16", "compute", EIGHT,
        dict(micro_batches_in_flight=2, dispatch="flat"),
    ),
    TWO_FULL: (
        "full", "bfloat16", "fp8", dict(node=2, gpu=2), dict(micro_batches_in_flight=2),
    ),
    "none with zero 3": ("none", "bfloat16", "compute", EIGHT, dict(zero=3)),
    "report, fp8, a stage": ("report", "fp8", "fp8", STAGED, {}),
    "attention, bf16, a stage": ("attention", "bfloat16", "compute", STAGED, {}),
    "full, fp8, a stage": ("full", "fp8", "fp8", STAGED, dict(capacity_factor=1.25)),
    "none, a stage, scores in blocks": (
        "none", "float32", "compute", STAGED, dict(attention_block=48),
    ),
}  # fmt: skip


def small(recompute, recipe, dispatch, mesh, layout, **batch):
    config = v3_tiny.get_config()
    config.model.update(heads=4, d_value=24)
    config.mesh.update(**{"gpu": 1, **mesh})
    config.layout.update(recompute=recompute, **layout)
    config.precision.update(recipe=recipe, dispatch=dispatch)
    sequences = 8 * config.layout.micro_batches_in_flight
    config.batch.update(**{"sequences": sequences, "ramp_sequences": sequences, **batch})
    return configs.parse(config)


def total(config, *, dense=False):
    return sum(activations.layer_residuals(config, dense=dense).values())


def traced(leaves):
    return sum(map(residual_trace.nbytes, leaves))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in (TWO_FULL, TWO_FLAT))) for n in CASES],
)
def test_the_closed_form_counts_what_a_trace_finds(name):
    config = small(*CASES[name])
    if config.mesh.pipe > 1:
        assert total(config) == traced(residual_trace.of_layer_pass(config))
    else:
        for dense in (False, True):
            assert total(config, dense=dense) == traced(
                residual_trace.of_block(config, dense=dense)
            )


@pytest.mark.slow
def test_so_it_does_for_the_published_model():
    config = configs.parse(v3_671b.get_config())
    assert total(config) == traced(residual_trace.of_layer_pass(config))


def test_policies_and_recipes_keep_less_in_their_order():
    def kept(recompute, recipe, mesh):
        return total(small(recompute, recipe, "fp8", mesh, {}))

    for recipe in ("bfloat16", "fp8"):
        each = [kept(name, recipe, STAGED) for name in ("none", "report", "attention", "full")]
        assert each == sorted(each, reverse=True) and len(set(each)) == 4
    assert kept("report", "fp8", STAGED) < kept("report", "bfloat16", STAGED)


def test_longer_sequences_and_more_of_them_keep_more():
    def kept(**batch):
        return total(small("report", "bfloat16", "fp8", EIGHT, {}, **batch))

    short, long = kept(length=128), kept(length=256)
    more = kept(length=128, micro_sequences=16, sequences=16, ramp_sequences=16)
    assert short < long and short < more < 2.001 * short


def test_what_does_not_change_shapes_is_traced_once():
    config = small("none", "bfloat16", "compute", dict(gpu=1), {})
    first = activations.layer_residuals(config)
    again = dataclasses.replace(config, seed=7)
    assert activations.layer_residuals(again) is first
