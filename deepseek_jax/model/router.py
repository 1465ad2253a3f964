"""Router: affinities, node-limited top-k routing, auxiliary-loss-free balance (section 2.1.2)."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params
from deepseek_jax.parallel import axes
from deepseek_jax.precision.recipes import FLOAT32
from deepseek_jax.precision.saved import Saved, save


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Traffic:
    """Token counts of one device's dispatch in one layer, summable over devices and micro-batches.

    Attributes:
      nodes, gpus: float32, tokens for each node, and for each GPU, of the expert-parallel group; a
        token with several experts there counts once.
      rounds: () float32, dispatch rounds: 1, plus overflow rounds where a buffer was full.
    """

    nodes: jax.Array
    gpus: jax.Array
    rounds: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Output of one layer's router.

    Attributes:
      experts: BSK int32 in [0, E).
      weights: BSK float32, gate values: normalised where the model does, times the routed scale.
      load: E float32, tokens of this device for each expert.
      balance: () float32, sequence-wise balance loss (equations 17 to 20) without its factor alpha,
        summed over this device's sequences; 1 per sequence is perfect balance.
      traffic: tokens for each node and each GPU.
      index_loss: () float32, loss of the indexer of the same layer, where the layer runs in steps
        (`model/overlapped/`); else None.
    """

    experts: jax.Array
    weights: jax.Array
    load: jax.Array
    balance: jax.Array
    traffic: Traffic
    index_loss: jax.Array | None = None


def joined(routings: list[Routing]) -> Routing:
    """Routing of several micro-batches as that of one batch."""
    if len(routings) == 1:
        return routings[0]
    experts, weights = (
        jnp.concatenate([getattr(r, name) for r in routings]) for name in ("experts", "weights")
    )
    sums = [(r.load, r.balance, r.traffic, r.index_loss) for r in routings]
    return Routing(experts, weights, *jax.tree.map(lambda *parts: sum(parts), *sums))


class Router(nnx.Module):
    """Scores all experts in float32 and chooses top_k of them, in top_groups of the groups."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dims = (("model", config.d_model), (None, config.experts))
        self.centroids = params.weight(rngs, *dims, std=config.init_std, sensitive=True)  # DE
        self.bias = params.router_bias(config.experts)  # E
        self.config = config

    @jax.named_scope("router")
    def __call__(self, x: jax.Array, chosen: jax.Array | None = None) -> Routing:
        """Routes x BSD, the normalised input of the feed-forward layer.

        Args:
          chosen: BSK int32, experts chosen for the same x before, which are weighed again.
        """
        config = self.config
        chex.assert_shape(x, (None, None, config.d_model), custom_message="x: BSD")
        logits = FLOAT32.einsum("BSD,DE->BSE", x, self.centroids[...])
        scores = _SCORES[config.score](logits)
        experts, weights = select_experts(scores, self.bias[...], config, chosen)
        gpus = axes.size("experts")
        nodes = gpus // axes.devices(tuple(n for n in axes.names("experts") if n == "gpu"))
        return Routing(
            experts,
            weights,
            load=_count(experts, config.experts).sum((0, 1)),
            balance=sequence_balance(scores, config.top_k),
            traffic=Traffic(
                nodes=visits(experts, config.experts, nodes),
                gpus=visits(experts, config.experts, gpus),
                rounds=jnp.ones(()),
            ),
        )


def sqrt_softplus(logits: jax.Array) -> jax.Array:
    """sqrt(log(1 + e^x)), V4's affinity; finite in value and gradient for every finite x.

    Below -20 it is e^(x/2) in float32, where e^x would underflow.
    """
    below = logits < -20
    small = jnp.exp(jnp.where(below, logits, -20) / 2)
    return jnp.where(below, small, jnp.sqrt(jax.nn.softplus(jnp.where(below, -20, logits))))


_SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax, "sqrtsoftplus": sqrt_softplus}


def select_experts(
    scores: jax.Array, bias: jax.Array, config: ModelConfig, experts: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Chooses each token's experts (equation 16 and node-limited routing) and weighs them (13, 14).

    Args:
      scores: BSE float32 affinities.
      bias: E float32, in the unit of the scores; it affects the choice, never the weight.
      experts: BSK int32, experts chosen before, which are only weighed.

    Returns:
      experts BSK int32, and weights BSK float32: the affinities of the chosen experts, normalised
      to sum to one where `normalise_weights`, times `routed_scale`.
    """
    chex.assert_shape(scores, (None, None, config.experts), custom_message="scores: BSE float32")
    chex.assert_shape(bias, (config.experts,), custom_message="bias: E float32")
    chex.assert_type([scores, bias], jnp.float32)
    # Saved for backward: a recomputation could choose otherwise where two scores are nearly equal.
    if experts is None:
        experts = save(Saved.ROUTE, _choose(scores, bias, config))
    # A one-hot product instead of a gather: exact, and its gradient is dense.
    chosen = jax.nn.one_hot(experts, config.experts, dtype=scores.dtype)  # BSKE
    weights = jnp.sum(chosen * scores[:, :, None], axis=-1)
    if config.normalise_weights:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return experts, weights * config.routed_scale


def _choose(scores: jax.Array, bias: jax.Array, config: ModelConfig) -> jax.Array:
    """Top-k experts BSK by biased affinity, node-limited: within the best `top_groups` groups."""
    biased = lax.stop_gradient(scores) + bias[None, None]
    if config.groups > 1:
        biased = _keep_best_groups(biased, config)
    return lax.top_k(biased, config.top_k)[1]


def _keep_best_groups(biased: jax.Array, config: ModelConfig) -> jax.Array:
    """Biased affinities BSE, -inf outside the `top_groups` best groups (nodes) of each token."""
    batch, length, experts = biased.shape
    grouped = biased.reshape(batch, length, config.groups, -1)  # BSE -> BSG(E/G)
    if config.group_score == "top2":
        group_score = lax.top_k(grouped, 2)[0].sum(-1)
    else:
        group_score = grouped.max(-1)
    _, best = lax.top_k(group_score, config.top_groups)
    kept = jax.nn.one_hot(best, config.groups, dtype=jnp.bool_).any(2)  # BSG
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(batch, length, experts)


def sequence_balance(scores: jax.Array, top_k: int) -> jax.Array:
    """Sequence-wise balance loss without alpha (equations 17 to 20): sum of f_e P_e over sequences.

    f counts the top-K of the unbiased affinities over all experts, as in equation 18, not the
    experts of the biased, node-limited choice. It has no gradient.
    """
    experts = scores.shape[-1]
    _, best = lax.top_k(lax.stop_gradient(scores), top_k)
    f = _count(best, experts).mean(1) * (experts / top_k)  # BE
    p = (scores / scores.sum(-1, keepdims=True)).mean(1)  # BE
    return jnp.sum(f * p)


def _count(experts: jax.Array, total: int) -> jax.Array:
    """Counts of each expert among a token's choices, BSK -> BSE float32."""
    return jax.nn.one_hot(experts, total, dtype=jnp.float32).sum(2)


def visits(experts: jax.Array, total: int, parts: int) -> jax.Array:
    """Tokens with an expert in each of `parts` equal runs of experts, BSK -> P float32."""
    part = experts // (total // parts)
    numbers = jnp.arange(parts, dtype=part.dtype)[None, None, None]
    there = (part[..., None] == numbers).any(-2)  # BSP
    return there.sum((0, 1)).astype(jnp.float32)


def max_violation(load: jax.Array) -> jax.Array:
    """MaxVio of each layer, (max load - mean load) / mean load; load LE -> L."""
    mean = load.mean(-1)
    return (load.max(-1) - mean) / mean


def move_bias(bias: jax.Array, load: jax.Array, speed: jax.Array) -> jax.Array:
    """Bias update of auxiliary-loss-free balancing: b + gamma * sign(mean load - load), (L)E.

    The bias of overloaded experts falls by the update speed gamma, that of others rises.
    """
    return bias + speed * jnp.sign(load.mean(-1, keepdims=True) - load)
