"""AdamW as in section 4.2: global-norm clipping, decoupled decay, moments in float32 or BF16."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config import OptimizerConfig


def build(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients -> the step before it is scaled by minus the learning rate.

    Global arrays in, whatever their layout: the clipping norm is over all parameters once.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        scale_by_adam(config.b1, config.b2, config.eps, jnp.dtype(config.moments)),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(config.decayed)),
    )


def decay_mask(decayed: str) -> Any:
    """What decays: everything ("all"), or everything but norm scales ("matrices")."""
    if decayed == "all":
        return None

    def mask(params):
        def is_matrix(path, _):
            names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
            return "scale" not in names

        return jax.tree_util.tree_map_with_path(is_matrix, params)

    return mask


def scale_by_adam(b1: float, b2: float, eps: float, moments: Any) -> optax.GradientTransformation:
    """Adam's direction, computed in float32, both moments kept in the dtype `moments`.

    optax's own keeps the second moment in the parameters' dtype.
    """

    def init(params):
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, moments), params)
        return optax.ScaleByAdamState(
            count=jnp.zeros((), jnp.int32), mu=zeros, nu=jax.tree.map(jnp.zeros_like, zeros)
        )

    def update(grads, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        steps = count.astype(jnp.float32)
        first, second = 1 - b1**steps, 1 - b2**steps

        def mean(g, m):
            return b1 * m.astype(jnp.float32) + (1 - b1) * g

        def square(g, v):
            return b2 * v.astype(jnp.float32) + (1 - b2) * jnp.square(g)

        mu, nu = jax.tree.map(mean, grads, state.mu), jax.tree.map(square, grads, state.nu)
        direction = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + eps), mu, nu)
        kept = jax.tree.map(lambda x: x.astype(moments), (mu, nu))
        return direction, optax.ScaleByAdamState(count, *kept)

    return optax.GradientTransformation(init, update)
