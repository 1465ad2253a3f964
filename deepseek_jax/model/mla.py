"""Multi-head latent attention, training form: section 2.1.1 of the report, equations 1 to 11."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params, rotary
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.parallel import axes

LATENT_NORM_EPS = 1e-6  # of the two latent norms, whatever the model's own norm_eps is


class LatentAttention(nnx.Module):
    """Attention whose past is one latent and one rotary key per token, shared by all heads."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        model, heads = ("model", config.d_model), ("heads", config.heads)
        query = ("head_width", config.d_nope + config.d_rope)
        key_value = ("head_width", config.d_nope + config.d_value)
        q_latent, kv_latent = ("q_latent", config.q_latent), ("kv_latent", config.kv_latent)
        std = config.init_std
        if config.q_latent:
            self.query_down = params.weight(rngs, model, q_latent, std=std)  # DQ, W^DQ
            self.query_norm = RMSNorm(config.q_latent, eps=LATENT_NORM_EPS, axis="q_latent")
            self.query_up = params.weight(
                rngs, q_latent, heads, query, std=std
            )  # QH(N+R), W^UQ, W^QR
        else:
            self.query = params.weight(rngs, model, heads, query, std=std)  # DH(N+R)
        latent_and_rope = (None, config.kv_latent + config.d_rope)
        self.kv_down = params.weight(rngs, model, latent_and_rope, std=std)  # D(C+R), W^DKV, W^KR
        self.kv_norm = RMSNorm(config.kv_latent, eps=LATENT_NORM_EPS, axis="kv_latent")
        self.kv_up = params.weight(
            rngs, kv_latent, heads, key_value, std=std
        )  # CH(N+W), W^UK, W^UV
        value = ("head_width", config.d_value)
        self.out = params.weight(rngs, heads, value, model, std=std)  # HWD, W^O
        self.config = config

    def __call__(self, x: jax.Array, how: Execution) -> jax.Array:
        """x BSD, already normalised -> BSD, before the residual is added."""
        config, einsum = self.config, how.recipe.einsum
        positions = jnp.arange(x.shape[1])

        # The non-rotary part leads and turns by angle zero: no head is taken apart.
        turn = rotary.cos_sin(config, positions, still=config.d_nope)
        query = rotary.rotate(self._query(x, how), *(part[None, :, None] for part in turn))

        latent, key_rope = self.latent(x, how)  # BSC, BSR
        latent = axes.fan_out(self.kv_norm(latent), "heads")
        key_rope = axes.fan_out(key_rope, "heads")
        key_value = einsum("BSC,CHX->BSHX", latent, self.kv_up[...])
        key_nope, value = jnp.split(key_value, [config.d_nope], axis=-1)
        turn = rotary.cos_sin(config, positions)
        key_rope = rotary.rotate(key_rope, *(part[None] for part in turn))[:, :, None]  # BS1R
        key_rope = jnp.broadcast_to(key_rope, (*key_nope.shape[:-1], config.d_rope))
        key = jnp.concatenate([key_nope, key_rope], axis=-1)

        scale = rotary.softmax_scale(config)
        block, keep = how.attention_block, how.recompute == "none"
        mixed = causal_attention(query, key, value, scale=scale, block=block, keep_scores=keep)
        mixed = checkpoint_name(mixed, "attention")
        return axes.fan_in(einsum("BSHW,HWD->BSD", mixed, self.out[...]), "heads")

    def latent(self, x: jax.Array, how: Execution) -> tuple[jax.Array, jax.Array]:
        """What decoding keeps, before norm and rotation (equations 1 and 3): BSC and BSR."""
        down = how.recipe.einsum("BSD,DX->BSX", x, self.kv_down[...])
        latent, key_rope = jnp.split(down, [self.config.kv_latent], axis=-1)
        return checkpoint_name(latent, "kv_latent"), checkpoint_name(key_rope, "key_rope")

    def _query(self, x: jax.Array, how: Execution) -> jax.Array:
        """Equations 6 to 8, before rotation: BSH(N+R), the rotary part last."""
        einsum = how.recipe.einsum
        if not self.config.q_latent:
            return einsum("BSD,DHX->BSHX", axes.fan_out(x, "heads"), self.query[...])
        down = checkpoint_name(einsum("BSD,DQ->BSQ", x, self.query_down[...]), "query_latent")
        latent = axes.fan_out(self.query_norm(down), "heads")
        return einsum("BSQ,QHX->BSHX", latent, self.query_up[...])


def attend(norm: RMSNorm, attention: LatentAttention, x: jax.Array, how: Execution) -> jax.Array:
    """x + MLA(norm x), BSD."""
    return checkpoint_name(x + attention(norm(x), how), "attended")


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    block: int,
    keep_scores: bool = False,
) -> jax.Array:
    """softmax(scale * query . key) value over the past, equations 10 and 11; softmax in float32.

    Queries go `block` rows at a time and meet only the keys up to their own end, so that most of
    the half that the mask would remove is never computed.

    Args:
      query, key: BSHX, any common width X.
      value: BSHW.
      keep_scores: keep the softmax of all blocks for backward instead of making each again.

    Returns:
      BSHW in the dtype of `query`.
    """
    length = query.shape[1]
    starts = range(0, length, block)

    def rows(start: int) -> jax.Array:
        end = min(start + block, length)
        return _attend(query[:, start:end], key[:, :end], value[:, :end], scale, start)

    one = rows if keep_scores else jax.checkpoint(rows, static_argnums=0)
    return jnp.concatenate([one(start) for start in starts], axis=1)


def _attend(query, key, value, scale, start):
    exact = "highest" if query.dtype == jnp.float32 else None
    scores = jnp.einsum(
        "BSHX,BTHX->BHST", query, key, precision=exact, preferred_element_type=jnp.float32
    )
    past = start + jnp.arange(query.shape[1])[:, None] >= jnp.arange(key.shape[1])[None]  # ST
    scores = jnp.where(past[None, None], scores * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum(
        "BHST,BTHW->BSHW", weights, value, precision=exact, preferred_element_type=jnp.float32
    ).astype(query.dtype)
