"""Split backward pass: equal results, and no additional work."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from deepseek_jax.parallel.pipeline import split_backward
from deepseek_jax.precision.einsum import transposed

W = [jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate([(16, 32), (32, 16)])]
X, PULL = (jax.random.normal(jax.random.key(n), (8, 16)) for n in (2, 3))


def plain(w, x):
    return jnp.tanh(x @ w[0]) @ w[1]


def with_calls(w, x):
    """Everything that the model's backward pass is nested in."""
    inner = jax.jit(lambda h, b: jax.nn.silu(h) @ b)
    h = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w[0], x)
    h = lax.map(lambda row: row * 2, h)
    return lax.cond(h.sum() > 0, lambda h: inner(h, w[1]), lambda h: 3 * inner(h, w[1]), h)


@pytest.mark.parametrize("fn", [plain, with_calls])
def test_both_halves_are_the_whole(fn):
    def halves(w, x, pull):
        _, back = jax.vjp(fn, w, x)
        later, now = split_backward.split(lambda: back(pull))
        return later.make(), now

    want = jax.vjp(fn, W, X)[1](PULL)
    got = jax.jit(halves)(W, X, PULL)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def flops(fn, *given):
    return jax.jit(fn).lower(*given).compile().cost_analysis()["flops"]


def test_nothing_is_computed_twice():
    def later_and_now(w, x, pull):
        later, now = split_backward.split(lambda: jax.vjp(plain, w, x)[1](pull))
        structures.append(jax.tree.structure(later))
        return jax.tree.leaves(later), now

    structures = []
    leaves, _ = jax.eval_shape(later_and_now, W, X, PULL)
    rest = flops(lambda *leaves: jax.tree.unflatten(structures[0], leaves).make(), *leaves)
    whole = flops(lambda w, x, pull: jax.vjp(plain, w, x)[1](pull), W, X, PULL)
    assert rest + flops(later_and_now, W, X, PULL) == pytest.approx(whole, rel=0.01)
    assert rest == pytest.approx(2 * 2 * 8 * 16 * 32, rel=0.05)  # two products of 8 rows


def test_what_waits_is_inputs_and_gradients_not_weights():
    later, _ = split_backward.split(lambda: jax.vjp(plain, W, X)[1](PULL))
    assert not {leaf.shape for leaf in later.arrays} & {w.shape for w in W}
    assert len(later.arrays) == 4


def test_both_halves_keep_their_scopes():
    """In a call, and in a backward rule of its own."""

    @jax.custom_vjp
    def product(w, x):
        return x @ w

    @jax.named_scope("of_product")
    def backward(kept, pull):
        w, x = kept
        return x.T @ pull, pull @ w.T

    product.defvjp(lambda w, x: (product(w, x), (w, x)), backward)

    @jax.named_scope("outer")
    def fn(w, x):
        return jax.checkpoint(product)(w, jnp.tanh(x))

    def halves(w, x, pull):
        later, now = split_backward.split(lambda: jax.vjp(fn, w, x)[1](pull))
        with jax.named_scope("later"):
            return later.make(), now

    program = jax.jit(halves).lower(W[0], X, X @ W[0]).compile().as_text()
    scopes = {
        line.split('op_name="')[1].split('"')[0]
        for line in program.splitlines()
        if " dot(" in line and "op_name" in line
    }
    assert len(scopes) == 2, scopes
    assert all("outer" in scope and "of_product" in scope for scope in scopes), scopes
    assert sum("later" in scope for scope in scopes) == 1, scopes


def test_metadata_stay_with_their_call():
    """As those of a transpose that XLA for CPUs must not inline, in a backward rule."""

    @jax.custom_vjp
    def product(w, x):
        return x @ w

    def backward(kept, pull):
        w, x = kept
        return transposed("MD->DM", x) @ pull, pull @ transposed("DF->FD", w)

    product.defvjp(lambda w, x: (product(w, x), (w, x)), backward)

    def halves(w, x, pull):
        later, now = split_backward.split(lambda: jax.vjp(product, w, x)[1](pull))
        return later.make(), now

    def whole(w, x, pull):
        return jax.vjp(product, w, x)[1](pull)

    texts = [jax.jit(fn).lower(W[0], X, X @ W[0]).as_text() for fn in (whole, halves)]
    calls = [text.count("inlineable") for text in texts]
    assert calls[0] == calls[1] >= 2, calls
