"""JAX's CUDA plugin without a GPU: usable to compile for clusters, and silent otherwise."""

import importlib.machinery
import os
import pkgutil
import subprocess
import sys

import jax
import pytest

import deepseek_jax
from deepseek_jax.aot import cluster

STARTS = "import deepseek_jax, jax; print(jax.devices()[0].platform)"


def installed(monkeypatch, plugins, *, driver):
    """These JAX plugins and this driver, on a machine with nothing chosen; returns the updates."""
    folder = importlib.machinery.ModuleSpec("jax_plugins", None, is_package=True)
    specs = {"jax_plugins": folder if plugins else None, "libtpu": None}
    modules = [pkgutil.ModuleInfo(None, name, True) for name in plugins]
    updates = []
    monkeypatch.setattr(deepseek_jax.importlib.util, "find_spec", lambda name: specs[name])
    monkeypatch.setattr(deepseek_jax.pkgutil, "iter_modules", lambda _: modules)
    monkeypatch.setattr(deepseek_jax, "_has_driver", lambda: driver)
    monkeypatch.setattr(deepseek_jax, "_platforms", lambda: None)
    monkeypatch.setattr(jax.config, "update", lambda *what: updates.append(what))
    return updates


@pytest.mark.parametrize(
    ("plugins", "driver", "chosen"),
    [
        (["xla_cuda13"], False, True),
        (["xla_cuda12", "xla_cuda13"], False, True),
        (["xla_cuda13"], True, False),
        (["xla_cuda13", "xla_rocm7"], False, False),  # JAX tries the other one
        ([], False, False),
    ],
)
def test_the_cpu_is_chosen_only_where_nothing_else_can_be(monkeypatch, plugins, driver, chosen):
    updates = installed(monkeypatch, plugins, driver=driver)
    deepseek_jax._use_the_cpu_without_a_driver()
    assert updates == [("jax_platforms", "cpu")] * chosen


def test_a_choice_already_made_is_kept(monkeypatch):
    updates = installed(monkeypatch, ["xla_cuda13"], driver=False)
    monkeypatch.setattr(deepseek_jax, "_platforms", lambda: "cuda")
    deepseek_jax._use_the_cpu_without_a_driver()
    assert not updates


@pytest.mark.skipif(not cluster.installed(), reason="needs the CUDA plugin, the extra [cluster]")
@pytest.mark.skipif(deepseek_jax._has_driver(), reason="this machine has an NVIDIA driver")
def test_start_up_is_silent():
    clean = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-c", STARTS]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("cpu\n", 0)
    assert "Traceback" not in done.stderr and "plugin" not in done.stderr, done.stderr
