"""Cache bytes per token of MLA, multi-head attention (MHA) and grouped-query attention (GQA).

Per token and layer, MLA caches one latent and one rotated key for all heads, MHA a key and a value
per head, and GQA a key and a value per group of heads.
"""

import dataclasses

from deepseek_jax.config import ModelConfig

GROUPS = 8  # key-value heads of the usual grouped-query models (Qwen2.5-72B, Llama-3.1-405B)


@dataclasses.dataclass(frozen=True)
class Cache:
    """Cache bytes per token over all layers of the main model.

    Attributes:
      mla: Bytes of MLA, with the keys of V3.2's indexer.
      mha: Bytes of MHA, with keys and values of width `d_value`.
      gqa: Bytes of GQA with `gqa_heads` pairs of the same width.
      gqa_heads: Key-value heads of GQA.
    """

    mla: int
    mha: int
    gqa: int
    gqa_heads: int


def cache_bytes_per_token(config: ModelConfig, bytes_each: int = 2) -> Cache:
    """Computes the cache bytes per token; DeepSeek-V3 in bfloat16: MLA 70,272, MHA 3,997,696."""
    index = config.index_width if config.index_heads else 0
    pair = 2 * config.d_value * config.layers * bytes_each
    groups = min(GROUPS, config.heads)
    return Cache(
        mla=(config.kv_latent + config.d_rope + index) * config.layers * bytes_each,
        mha=config.heads * pair,
        gqa=groups * pair,
        gqa_heads=groups,
    )
