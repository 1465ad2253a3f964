"""Estimated floating-point operations per token: 6 per activated weight, plus attention."""

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.count import count


def training_flops_per_token(config: ModelConfig, length: int, *, causal: bool = True) -> float:
    """FLOPs per token of forward and backward of the main model, without MTP and recomputation.

    A weight that one token uses counts 6, except in the embedding, which is looked up. Attention
    counts 6 L H (N + R + W) S: L layers, H heads, N + R query and key width, W value width, S
    `length`. `causal` halves it, as the causal mask leaves half of the scores.
    """
    widths = config.d_nope + config.d_rope + config.d_value
    attention = 6 * config.layers * config.heads * widths * length * (0.5 if causal else 1.0)
    counted = count(config)
    return 6 * (counted.activated - counted.input_table) + attention
