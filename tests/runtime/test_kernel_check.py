"""Kernels are refused for a wrong number, an error, another GPU, and another process."""

import types

import jax.numpy as jnp
import pytest

from deepseek_jax.errors import RunError
from deepseek_jax.runtime import kernel_check
from deepseek_jax.runtime.kernel_check import Check, refused

HOPPER = types.SimpleNamespace(compute_capability="9.0")


def right():
    return jnp.arange(10), jnp.ones(2)


def wrong():
    return jnp.arange(10).at[3].set(0), jnp.ones(2)


def undefined():
    return jnp.arange(10), jnp.full(2, jnp.nan)


def smaller():
    return jnp.arange(1), jnp.ones(2)


def fewer():
    return (jnp.arange(10),)


def broken():
    raise RuntimeError("no ptxas\nanywhere")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (right, None),
        (wrong, "1 of 12 numbers of its check are wrong"),
        (undefined, "2 of 12 numbers of its check are wrong"),
        (smaller, "ValueError: its check has arrays of [(1,), (2,)], and needs [(10,), (2,)]"),
        (fewer, "ValueError: its check has arrays of [(10,)], and needs [(10,), (2,)]"),
        (broken, "RuntimeError: no ptxas anywhere"),
    ],
)
def test_a_kernel_must_equal_the_portable_form(kernel, reason):
    found = refused({"one": Check(right, right), "two": Check(kernel, right)}, HOPPER)
    assert found == ({"two": reason} if reason else {})


def test_a_gpu_of_another_generation_computes_nothing():
    def called():
        raise AssertionError("the kernel was tried")

    for found in ("8.0", "10.0", "gfx90a"):
        device = types.SimpleNamespace(compute_capability=found)
        check = Check(called, called, generation=9)
        reason = f"it needs compute capability 9.x, and this device has {found}"
        assert refused({"one": check}, device) == {"one": reason}
    assert refused({"one": Check(right, right, generation=9)}, HOPPER) == {}


def test_one_process_refuses_for_all():
    """This process finds no fault in the first kernel, and another process does."""
    asked = []

    def agree(text):
        asked.append(text)
        return "of another process" if len(asked) == 1 else text

    checks = {"b": Check(broken, right), "a": Check(right, right), "c": Check(right, right)}
    found = refused(checks, HOPPER, agree)
    assert found == {"a": "of another process", "b": "RuntimeError: no ptxas anywhere"}
    assert len(asked) == len(checks)  # every process asks as often, whatever it found


def test_a_kernel_that_never_ends(monkeypatch):
    monkeypatch.setattr(kernel_check, "SECONDS", 0.05)
    ended = kernel_check.threading.Event()
    try:
        with pytest.raises(RunError, match=r"kernel one .* set precision\.kernels=portable"):
            refused({"one": Check(ended.wait, right)}, HOPPER)
    finally:
        ended.set()
