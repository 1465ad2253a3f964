"""What the compiled gradient of the loss holds at once: never the vocabulary times all tokens."""

import functools

import jax
import jax.numpy as jnp
import pytest
import small
from flax import nnx

from deepseek_jax.model import execution
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.train import state, step

LENGTH, VOCAB, CHUNK = 128, 8192, 64
LOGITS = 4 * VOCAB * LENGTH  # bytes of one sequence's logits at one depth


@functools.cache
def temporary(depth=1, sequences=4, vocab=VOCAB, chunk=CHUNK, recompute="none"):
    """Bytes that value_and_grad of the loss holds besides its arguments and results."""
    config = small.config(
        model_layers=1, model_mtp_depth=depth, model_vocab=vocab, batch_length=LENGTH, layout_recompute=recompute,
        layout_attention_block=64,
    )  # fmt: skip
    graph, weights, bias = state.split(abstract_model(config.model))

    def loss(weights, bias, tokens):
        return step.objective(
            nnx.merge(graph, weights, bias), tokens, how=execution.of(config), chunk=chunk,
            mtp_weight=0.3, alpha=1e-4, sequences=sequences,
        )  # fmt: skip

    tokens = jax.ShapeDtypeStruct((sequences, LENGTH + 1), jnp.int32)
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return gradient.lower(weights, bias, tokens).compile(OPT).memory_analysis().temp_size_in_bytes
