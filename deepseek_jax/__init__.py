"""DeepSeek-V3 in JAX and Flax, sharded from the first line."""

from flax import nnx

nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
