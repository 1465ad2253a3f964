"""Shapes and dtypes that enter the model: a wrong one is refused while tracing, by name."""

import functools

import jax
import jax.numpy as jnp
import pytest
import small

from deepseek_jax.model import decoding, transformer
from deepseek_jax.model.causal_attention import causal_attention
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.loss import head_loss
from deepseek_jax.model.router import select_experts
from deepseek_jax.parallel.experts import permutation

B, S, D, V, E, H, M = 2, 3, 32, 64, 8, 4, 5
CONFIG = small.config().model
HOW = Execution()


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@functools.cache
def model():
    """Shapes of a model of which each stack is one layer."""
    whole = transformer.abstract_model(CONFIG)
    for name in ("moe_layers", "mtp"):
        stack = getattr(whole, name)
        setattr(whole, name, jax.eval_shape(lambda stack: decoding.layer_of(stack, 0), stack))
    return whole


def attend(model, x):
    return model.moe_layers.attention(x, HOW)


def decode(model, x, positions):
    return model.moe_layers.attention.decode(x, HOW, None, 0, positions)


def route(model, x):
    return model.moe_layers.feed.router(x)


def embed(model, tokens):
    return model.embedding(tokens, HOW)


def predict(model, hidden, embedding):
    return model.mtp(hidden, embedding, HOW)


def attention(_, query, key, value):
    return causal_attention(query, key, value, scale=1.0, block=2)


def choose(_, scores, bias):
    return select_experts(scores, bias, CONFIG)


def loss(_, hidden, head, targets, weights):
    return head_loss(hidden, head, targets, weights, 2)


def lanes(_, places):
    return permutation.lanes(places, E, 2)


def by_expert(_, places):
    return permutation.sorted_by_expert(places, E, 2)


HEADS = floats(B, S, H, 12)
ROWS = floats(M, D), floats(D, V), integers(M), floats(M)


@pytest.mark.parametrize(
    ("entry", "arguments", "message"),
    [
        (attend, [floats(B, S, D + 1)], "33.*x: BSD"),
        (attend, [floats(S, D)], "x: BSD"),
        (attend, [integers(B, S, D)], "int32.*float"),
        (decode, [floats(B, S, D), integers(S)], "positions: BS"),
        (decode, [floats(B, S, D), floats(B, S)], "float32.*int"),
        (attention, [HEADS, floats(B, S, H, 8), HEADS], "query and key: BSHX"),
        (attention, [HEADS, HEADS, floats(B, S, 1, 8)], "value: BSHW"),
        (attention, [HEADS, HEADS, integers(B, S, H, 8)], "int32.*float"),
        (route, [floats(B, D)], "x: BSD"),
        (choose, [floats(B, S, E + 1), floats(E)], "scores: BSE"),
        (choose, [floats(B, S, E), floats(1, E)], "bias: E"),
        (choose, [jax.ShapeDtypeStruct((B, S, E), jnp.bfloat16), floats(E)], "bfloat16.*float32"),
        (embed, [integers(S)], "tokens: BS"),
        (embed, [floats(B, S)], "float32.*int"),
        (predict, [floats(B, S, D), floats(B, S + 1, D)], "hidden and embedding: BSD"),
        (predict, [floats(B, S, D - 1), floats(B, S, D - 1)], "hidden: BSD"),
        (loss, [floats(M, D + 1), *ROWS[1:]], "hidden: MD, head: DV"),
        (loss, [*ROWS[:2], integers(M + 1), ROWS[3]], "targets, weights: M"),
        (loss, [*ROWS[:2], floats(M), ROWS[3]], "float32.*int"),
        (lanes, [integers(M)], "places: RK"),
        (by_expert, [floats(M, 2)], "float32.*int32"),
    ],
)
def test_a_wrong_shape_or_dtype_is_refused(entry, arguments, message):
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        jax.eval_shape(entry, model(), *arguments)


@pytest.mark.parametrize(
    ("entry", "arguments"),
    [
        (attend, [floats(B, S, D)]),
        (embed, [integers(B, S)]),
        (predict, [floats(B, S, D), floats(B, S, D)]),
        (attention, [HEADS, HEADS, floats(B, S, H, 8)]),
        (choose, [floats(B, S, E), floats(E)]),
        (loss, ROWS),
        (by_expert, [integers(M, 2)]),
        (lambda _, places: jax.vmap(functools.partial(lanes, None))(places), [integers(3, M, 2)]),
    ],
)
def test_right_shapes_pass(entry, arguments):
    assert jax.tree.leaves(jax.eval_shape(entry, model(), *arguments))
