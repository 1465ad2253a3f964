"""DeepSeekMoE: shared and routed experts (section 2.1.2, equation 12); the dense feed-forward."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.router import Router, Routing
from deepseek_jax.parallel import axes


def swiglu(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up in float32 from ...(2F), gate first; ...F in the dtype it was given."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def _joined(gate_up: jax.Array) -> jax.Array:
    """...2F -> ...(2F): both halves as one matmul."""
    return gate_up.reshape(*gate_up.shape[:-2], -1)


class FeedForward(nnx.Module):
    """W_down(silu(W_gate x) * W_up x): the dense layers, and the shared experts as one network."""

    def __init__(self, config: ModelConfig, width: tuple[str, int], *, rngs: nnx.Rngs):
        model, std = ("model", config.d_model), config.init_std
        self.gate_up = params.weight(rngs, model, (None, 2), width, std=std)  # D2F
        self.down = params.weight(rngs, width, model, std=std)  # FD
        self.axis = width[0]

    def __call__(self, x: jax.Array, how: Execution) -> jax.Array:
        einsum = how.recipe.einsum
        gate_up = einsum("BSD,DX->BSX", axes.fan_out(x, self.axis), _joined(self.gate_up[...]))
        hidden = swiglu(checkpoint_name(gate_up, "gate_up"))
        return axes.fan_in(einsum("BSF,FD->BSD", hidden, self.down[...]), self.axis)


class Experts(nnx.Module):
    """The routed experts of one layer, whichever of them are here."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        experts, model = ("experts", config.experts), ("model", config.d_model)
        width, std = ("expert_width", config.d_expert), config.init_std
        self.gate_up = params.weight(rngs, experts, model, (None, 2), width, std=std)  # ED2F
        self.down = params.weight(rngs, experts, width, model, std=std)  # EFD

    def __call__(
        self, rows: jax.Array, weights: jax.Array, sizes: jax.Array, likely: int, how: Execution
    ) -> jax.Array:
        """Rows MD sorted by expert, `likely` of them in use -> MD, each times its routing weight.

        The weight goes in before W_down, which is linear: so backward needs no expert outputs.
        """
        grouped = how.recipe.grouped
        gate_up = grouped(rows, _joined(self.gate_up[...]), sizes, likely)
        hidden = swiglu(checkpoint_name(gate_up, "gate_up"))
        hidden = (hidden.astype(jnp.float32) * weights[:, None]).astype(hidden.dtype)
        return grouped(hidden, self.down[...], sizes, likely)


class MixtureOfExperts(nnx.Module):
    """x -> sum of chosen experts, weighted, + shared experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.router = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        if config.shared_experts:
            self.shared = FeedForward(config, ("expert_width", config.d_shared), rngs=rngs)
        self.config = config

    def __call__(self, x: jax.Array, how: Execution) -> tuple[jax.Array, Routing]:
        """x BSD, normalised -> BSD before the residual, and what the gate decided."""
        routing = self.router(x)
        tokens = x.reshape(-1, x.shape[-1])  # BSD -> (BS)D
        experts = routing.experts.reshape(tokens.shape[0], -1)
        weights = routing.weights.reshape(experts.shape)

        def run(rows: jax.Array, row_weights: jax.Array, sizes: jax.Array, likely: int):
            return self.experts(checkpoint_name(rows, "arrived"), row_weights, sizes, likely, how)

        tokens, weights = (axes.fan_out(part, "expert_width") for part in (tokens, weights))
        routed = how.dispatch(run, tokens, experts, weights, self.config.experts)
        out = axes.fan_in(routed, "expert_width").reshape(x.shape)
        if self.config.shared_experts:
            out = out + self.shared(x, how)
        return checkpoint_name(out, "fed"), routing
