"""Recompute policies and attention blocks: equal results, and compiled FLOPs and memory of each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from deepseek_jax.model import execution, params, remat
from deepseek_jax.model.transformer import build_model
from deepseek_jax.precision.saved import Saved

FAST = {"xla_backend_optimization_level": "0"}  # for machine code only: work and buffers stay


@functools.cache
def built():
    """Two dense and two MoE layers, so that both stacks stay loops; and tokens BS."""
    config = small.config(model_layers=4, model_dense_layers=2, model_mtp_depth=0)
    build = jax.jit(lambda key: build_model(config.model, key))
    tokens = np.random.default_rng(0).integers(0, config.model.vocab, (8, 48))
    return build(jax.random.key(0)), jnp.asarray(tokens, jnp.int32)


def traced(recompute="none", block=16, unroll=1, in_flight=1):
    """(function of weights, bias, tokens to a scalar and its gradient; those arguments)."""
    model, tokens = built()
    graph, weights, bias = params.split(model)
    how = execution.Execution(
        remat=remat.BY_NAME[recompute], attention_block=block, unroll=unroll, in_flight=in_flight
    )

    def total(weights, bias, tokens):
        hidden = nnx.merge(graph, weights, bias).hidden(tokens, how)
        return jnp.square(hidden.heads).mean() + hidden.heads[..., 0].mean()

    return jax.value_and_grad(total), (weights, bias, tokens)


@functools.cache
def ran(recompute="none", block=16, unroll=1):
    """(value and gradient, floating-point operations, bytes held besides arguments and results)."""
    function, arguments = traced(recompute, block, unroll)
    compiled = jax.jit(function).lower(*arguments).compile(FAST)
    memory = compiled.memory_analysis().temp_size_in_bytes
    return compiled(*arguments), compiled.cost_analysis()["flops"], memory


@pytest.mark.parametrize(
    "changes",
    [
        dict(recompute="full"),
        dict(recompute="report"),
        dict(block=20, unroll=2),  # 20 does not divide 48
    ],
    ids=str,
)
def test_how_it_runs_never_changes_what_it_computes(changes):
    small.assert_close(ran(**changes)[0], ran()[0], rtol=2e-6)


def test_policies_redo_more_and_keep_less_in_order():
    """A loop's body counts once here, so these are the operations of one layer of each kind."""
    flops, memory = zip(*(ran(name)[1:] for name in ("none", "report", "full")), strict=True)
    assert flops[0] * 1.02 < flops[1] < flops[2] * 0.95
    assert memory[0] * 0.6 > memory[1] > memory[2] * 1.2
    # All but the embedding runs twice: backward costs two forwards, so FLOPs grow by a third.
    assert 1.2 < flops[2] / flops[0] < 1.4


def test_every_saved_name_is_in_the_model():
    text = ""
    for in_flight in (1, 2):
        function, arguments = traced(in_flight=in_flight)
        text += str(jax.make_jaxpr(function)(*arguments))
    # Sums are saved where a kernel computes attention: `test_causal_attention.py`.
    assert {name for name in Saved if f"name={name}" not in text} == {Saved.ATTENTION_SUM}
