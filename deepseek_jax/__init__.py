"""DeepSeek-V3 in JAX and Flax, sharded from the first line."""

from typing import Any

from flax import nnx

nnx.set_graph_mode(False)
nnx.set_graph_updates(False)


def __getattr__(name: str) -> Any:
    """`deepseek_jax.load`, without its imports for those who train."""
    if name == "load":
        from deepseek_jax.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
