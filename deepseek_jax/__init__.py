"""DeepSeek-V3 in JAX and Flax, sharded from the first line."""

# ruff: noqa: E402
from deepseek_jax.runtime import startup

startup.of_command()  # before JAX and others are looked for on sys.path

import ctypes
import importlib.util
import pkgutil
from typing import Any

if startup.needs_jax():
    import jax
    from flax import nnx

    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)


def __getattr__(name: str) -> Any:
    """`deepseek_jax.load`, without its imports for those who train."""
    if name == "load":
        from deepseek_jax.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _use_the_cpu_without_a_driver() -> None:
    """Selects the CPU where JAX's CUDA plugin is installed but no NVIDIA driver is.

    The plugin may be there only to compile for a virtual cluster (`aot/cluster.py`). JAX would
    start on the CPU anyway, after a long complaint of the plugin.
    """
    folder = importlib.util.find_spec("jax_plugins")
    if _platforms() or importlib.util.find_spec("libtpu") or folder is None:
        return
    names = [plugin.name for plugin in pkgutil.iter_modules(folder.submodule_search_locations)]
    if names and all(name.startswith("xla_cuda") for name in names) and not _has_driver():
        jax.config.update("jax_platforms", "cpu")


def _platforms() -> str | None:
    """The platforms that JAX_PLATFORMS or the caller chose; None where neither did."""
    return jax.config.values["jax_platforms"]


def _has_driver() -> bool:
    """Whether NVIDIA's driver is where the plugin would look for it."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


if startup.needs_jax():
    _use_the_cpu_without_a_driver()
