"""AdamW as in section 4.2: global-norm clipping, decoupled decay, moments in float32 or BF16.

`optimizer.name=muon` has Muon (`train/muon.py`) in place of Adam for the matrices of linear layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config import OptimizerConfig
from deepseek_jax.train import muon


def build(config: OptimizerConfig) -> optax.GradientTransformation:
    """Transformation of gradients into the step that is then scaled by minus the learning rate.

    It takes global arrays in any layout, so the clipping norm counts each parameter once.
    """
    moments = jnp.dtype(config.moments)
    direction = scale_by_adam(config.b1, config.b2, config.eps, moments)
    if config.name == "muon":
        direction = muon.beside(direction, config.muon_momentum, config.muon_rms, moments)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(config.decayed)),
    )


def decay_mask(decayed: str) -> Any:
    """Mask of the parameters that decay: None, for all, or all but norm scales ("matrices")."""
    if decayed == "all":
        return None

    def mask(params: Any) -> Any:
        def is_matrix(path: Any, _: Any) -> bool:
            names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
            return "scale" not in names

        return jax.tree_util.tree_map_with_path(is_matrix, params)

    return mask


def scale_by_adam(b1: float, b2: float, eps: float, moments: Any) -> optax.GradientTransformation:
    """Adam's direction, computed in float32; both moments are kept in the dtype `moments`.

    `optax.scale_by_adam` keeps the second moment in the parameters' dtype instead.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, moments), params)
        return optax.ScaleByAdamState(
            count=jnp.zeros((), jnp.int32), mu=zeros, nu=jax.tree.map(jnp.zeros_like, zeros)
        )

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any = None
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        steps = count.astype(jnp.float32)
        first, second = 1 - b1**steps, 1 - b2**steps

        def mean(g: jax.Array, m: jax.Array) -> jax.Array:
            return b1 * m.astype(jnp.float32) + (1 - b1) * g

        def square(g: jax.Array, v: jax.Array) -> jax.Array:
            return b2 * v.astype(jnp.float32) + (1 - b2) * jnp.square(g)

        mu, nu = jax.tree.map(mean, grads, state.mu), jax.tree.map(square, grads, state.nu)
        direction = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + eps), mu, nu)
        kept = jax.tree.map(lambda x: x.astype(moments), (mu, nu))
        return direction, optax.ScaleByAdamState(count, *kept)

    return optax.GradientTransformation(init, update)
