"""Estimated floating-point operations per token: 6 per activated weight, plus attention."""

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.count import count


def training_flops_per_token(config: ModelConfig, length: int, *, causal: bool = True) -> float:
    """FLOPs per token of forward and backward of the main model, without MTP and recomputation.

    A weight that one token uses counts 6, except in the embedding, which is looked up. Attention
    counts 6 L H (N + R + W) S: L layers, H heads, N + R query and key width, W value width, S
    `length`. `causal` halves it, as the causal mask leaves half of the scores. With an indexer no
    token attends to more than `index_top_k` positions, and index scores count 6 L J I S, halved
    too: J heads of width I.
    """
    widths = config.d_nope + config.d_rope + config.d_value
    scored = length * (0.5 if causal else 1.0)
    pairs = config.heads * widths * attended_positions(config, length, causal=causal)
    index = config.index_heads * config.index_width * scored
    counted = count(config)
    return 6 * (counted.activated - counted.input_table) + 6 * config.layers * (pairs + index)


def attended_positions(config: ModelConfig, length: int, *, causal: bool = True) -> float:
    """Mean number of positions that a token of a sequence attends to."""
    most = config.index_top_k if config.index_heads else length
    if not causal:
        return float(min(most, length))
    if most >= length:
        return length * 0.5
    return most - most * (most + 1) / (2 * length)  # mean of min(t, most) over t < length
