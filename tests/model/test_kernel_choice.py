"""Kernels in use: by the key, the platform and the checks; a CPU checks and says nothing."""

import dataclasses
import logging

import jax
import pytest
import small

from deepseek_jax.aot import layer
from deepseek_jax.kernels import fp8_outer, fp8_product, fp8_quantise, fp8_quantise_blocks
from deepseek_jax.kernels.kernel_names import OUTER, PRODUCT, QUANTISE
from deepseek_jax.model import execution, kernel_choice
from deepseek_jax.precision.recipes import BFLOAT16, FLOAT32, FP8
from deepseek_jax.runtime import kernel_check

EVERY = FP8.known_kernels


def test_a_layer_on_a_cpu_traces_no_kernel(monkeypatch):
    for kernel, name in (
        (fp8_product, "product"),
        (fp8_outer, "outer"),
        (fp8_quantise, "quantise"),
        (fp8_quantise_blocks, "quantise_blocks"),
    ):
        monkeypatch.setattr(kernel, name, None)  # a call would fail
    config = small.config(precision_recipe="fp8")
    assert execution.of(config).recipe.kernels == EVERY > {PRODUCT, OUTER, QUANTISE}
    layer.lower(config, small.mesh_of({}))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """This process as one on a GPU, whose checks find what the fixture is called with."""
    calls = []

    def with_faults(faults):
        def refused(checks, device):
            calls.extend(checks)
            return {name: reason for name, reason in faults.items() if name in checks}

        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(kernel_check, "refused", refused)
        return calls

    kernel_choice._fault.cache_clear()
    yield with_faults
    kernel_choice._fault.cache_clear()


def test_a_cpu_checks_nothing(monkeypatch, caplog):
    monkeypatch.setattr(kernel_check, "refused", None)  # a call would fail
    config = small.config(precision_recipe="fp8")
    # Programs for a virtual cluster have the kernels.
    assert execution.of(config).recipe.kernels == EVERY > {PRODUCT, OUTER, QUANTISE}
    assert execution.kernels_of(config.precision).summary() == {"kernels": "portable"}
    assert not caplog.records
    portable = small.config(precision_recipe="fp8", precision_kernels="portable")
    assert execution.of(portable).recipe.kernels == frozenset()
    assert execution.of(small.config()).recipe == FLOAT32


def test_what_a_gpu_refuses_is_said_once(on_a_gpu, caplog):
    calls = on_a_gpu({OUTER: "3 of 4 numbers of its check are wrong"})
    config = small.config(precision_recipe="fp8")
    with caplog.at_level(logging.WARNING):
        recipes = [execution.of(config).recipe for _ in range(2)]
    assert [recipe.kernels for recipe in recipes] == [EVERY - {OUTER}] * 2 and calls == sorted(
        EVERY
    )
    (line,) = (record.getMessage() for record in caplog.records)
    assert OUTER in line and "3 of 4 numbers" in line and "\n" not in line
    assert execution.kernels_of(config.precision).summary() == {
        "kernels": ", ".join(sorted(EVERY - {OUTER})),
        "kernels_refused": {OUTER: "3 of 4 numbers of its check are wrong"},
    }  # fmt: skip
    served = BFLOAT16.known_kernels
    want = dataclasses.replace(BFLOAT16, kernels=served)
    assert execution.recipe_of(config, serving=True) == want and OUTER not in served
    assert len(calls) == len(EVERY)  # none is checked again


def test_a_gpu_is_not_checked_for_the_portable_form(on_a_gpu):
    calls = on_a_gpu({})
    portable = small.config(precision_recipe="fp8", precision_kernels="portable")
    assert execution.of(portable).recipe.kernels == frozenset() and not calls
    assert execution.kernels_of(portable.precision).summary() == {"kernels": "portable"}
    every = execution.kernels_of(small.config(precision_recipe="fp8").precision)
    assert every.summary() == {"kernels": ", ".join(sorted(EVERY))}
    free = small.config(precision_recipe="fp8", precision_scales="free")  # quantised by division
    assert execution.kernels_of(free.precision).names == EVERY - {QUANTISE}


def test_messages_have_their_sms_where_experts_are_on_several_gpus():
    def sms(**changes):
        return execution.of(small.config(precision_recipe="fp8", **changes)).recipe.hopper.sms

    assert sms() == sms(mesh_replica=2) == 132
    assert sms(mesh_gpu=2) == sms(mesh_node=2, mesh_gpu=2) == 112
    assert sms(mesh_gpu=2, layout_communication_sms=8) == 124
