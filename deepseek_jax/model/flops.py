"""Floating-point operations of training per token: 6 per activated weight, plus attention."""

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.count import count


def training_flops_per_token(config: ModelConfig, length: int, *, causal: bool = True) -> float:
    """Forward and backward of the main model, without MTP modules and recomputation.

    6 per activated weight (the input table is looked up, not multiplied), and for attention
    6 L H (N + R + W) S, halved where the causal mask leaves half of the scores.
    """
    widths = config.d_nope + config.d_rope + config.d_value
    attention = 6 * config.layers * config.heads * widths * length * (0.5 if causal else 1.0)
    counted = count(config)
    return 6 * (counted.activated - counted.input_table) + attention
