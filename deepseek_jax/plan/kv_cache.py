"""Cache bytes that decoding keeps per token, and what plain attention of the same heads would keep.

MLA keeps one latent and one rotary key per layer for all heads; multi-head attention a key and a
value per head; grouped-query attention a key and a value per group of heads.
"""

import dataclasses

from deepseek_jax.config import ModelConfig

GROUPS = 8  # key-value heads of the usual grouped-query models (Qwen2.5-72B, Llama-3.1-405B)


@dataclasses.dataclass(frozen=True)
class Cache:
    """Bytes per token over all layers of the main model.

    Attributes:
      mla: latents of this model.
      mha: keys and values as wide as `d_value`, one pair per head.
      gqa: the same with `gqa_heads` pairs.
    """

    mla: int
    mha: int
    gqa: int
    gqa_heads: int


def cache_bytes_per_token(config: ModelConfig, bytes_each: int = 2) -> Cache:
    """70,272 with MLA and 3,997,696 without for DeepSeek-V3 in bfloat16."""
    pair = 2 * config.d_value * config.layers * bytes_each
    groups = min(GROUPS, config.heads)
    return Cache(
        mla=(config.kv_latent + config.d_rope) * config.layers * bytes_each,
        mha=config.heads * pair,
        gqa=groups * pair,
        gqa_heads=groups,
    )
