"""Memory of the compiled gradient of the loss: never the logits of all tokens."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
import small
from flax import nnx

from deepseek_jax.model import execution, params
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.train import objective

LENGTH, SEQUENCES, VOCAB, CHUNK = 128, 4, 8192, 64
FAST = {"xla_backend_optimization_level": "0"}  # for machine code only: buffers stay


@functools.cache
def temporary(depth=0, sequences=SEQUENCES, vocab=VOCAB, chunk=CHUNK):
    """Bytes that value_and_grad of the loss holds besides its arguments and results."""
    config = small.config(
        model_layers=1, model_mtp_depth=depth, model_vocab=vocab, batch_length=LENGTH,
        layout_attention_block=64,
    )  # fmt: skip
    graph, weights, bias = params.split(abstract_model(config.model))
    how = execution.of(config)

    def loss(weights, bias, tokens):
        model = nnx.merge(graph, weights, bias)
        settings = dict(chunk=chunk, mtp_weight=0.3, alpha=1e-4, sequences=sequences)
        return objective.objective(model, tokens, how=how, **settings)

    tokens = jax.ShapeDtypeStruct((sequences, LENGTH + 1), jnp.int32)
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = gradient.lower(weights, bias, tokens).compile(FAST)
    return compiled.memory_analysis().temp_size_in_bytes


def logits(sequences=SEQUENCES):
    """Bytes of all logits of one head, which must never exist together."""
    return 4 * sequences * LENGTH * VOCAB


def test_all_logits_would_not_fit():
    assert temporary(sequences=2 * SEQUENCES) < logits(2 * SEQUENCES) / 2


def test_what_tokens_cost_does_not_depend_on_the_vocabulary():
    large = temporary(sequences=2 * SEQUENCES) - temporary()
    less = temporary(sequences=2 * SEQUENCES, vocab=VOCAB // 8) - temporary(vocab=VOCAB // 8)
    assert large == pytest.approx(less, rel=0.01)


def test_what_the_vocabulary_costs_are_tables_and_one_chunk():
    """The tables' gradients may be held once more before they are returned, in float32."""
    added = VOCAB - VOCAB // 8
    tables, chunks = 2 * 4 * added * 32, 4 * added * CHUNK
    assert temporary() - temporary(vocab=VOCAB // 8) < tables + 2 * chunks


def test_larger_chunks_cost_what_their_logits_take():
    """Logits and their gradient: between one and two float32 numbers for each."""
    growth = temporary(chunk=4 * CHUNK) - temporary()
    one = 4 * 3 * CHUNK * VOCAB
    assert one * 0.9 < growth < one * 2.1


def test_each_mtp_depth_adds_the_same_activations_and_no_logits():
    """The first ones also move the moment of the peak, so the sizes agree from the third on."""
    held = [temporary(depth=depth) for depth in range(5)]
    added = [after - before for before, after in itertools.pairwise(held)]
    assert added[3] == pytest.approx(added[2], rel=0.05)
    assert max(added) < 0.4 * logits()
