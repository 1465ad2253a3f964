"""AdamW as in section 4.2: global-norm clipping, decoupled decay, moments in float32 or BF16.

`optimizer.name=muon` has Muon (`train/muon.py`) in place of Adam for the matrices of linear layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config import OptimizerConfig
from deepseek_jax.train import muon
from deepseek_jax.train.index_training import is_of_indexer


def build(config: OptimizerConfig) -> optax.GradientTransformation:
    """Transformation of gradients into the step that is then scaled by minus the learning rate.

    It takes global arrays in any layout, so the clipping norm counts each parameter once.
    """
    moments = jnp.dtype(config.moments)
    direction = scale_by_adam(config.b1, config.b2, config.eps, moments)
    if config.name == "muon":
        direction = muon.beside(direction, config.muon_momentum, config.muon_rms, moments)
    return optax.chain(
        clip(config.clip),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(config.decayed)),
    )


def clip(most: float) -> optax.GradientTransformation:
    """Clipping by the global norm; by norms of their own for V3.2's indexers and all the rest.

    The loss of the indexers is none of the model's, and neither shortens the other's step.
    """
    whole = optax.clip_by_global_norm(most)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, tree = jax.tree_util.tree_flatten_with_path(grads)
        own = [is_of_indexer(path) for path, _ in leaves]
        if not any(own):
            return whole.update(grads, state, params)
        clipped: list[Any] = [leaf for _, leaf in leaves]
        for group in (True, False):
            part = [i for i, is_own in enumerate(own) if is_own == group]
            some, _ = whole.update([clipped[i] for i in part], state)
            for i, value in zip(part, some, strict=True):
                clipped[i] = value
        return jax.tree.unflatten(tree, clipped), state

    return optax.GradientTransformation(whole.init, update)


def decay_mask(decayed: str) -> Any:
    """Mask of the parameters that decay: None, for all, or all but those of norms ("matrices")."""
    if decayed == "all":
        return None

    def mask(params: Any) -> Any:
        def is_matrix(path: Any, _: Any) -> bool:
            names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
            return not {"scale", "bias"}.intersection(names)

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
