"""Drafts equal those of the training form; verification changes no token and no distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving
import small
from published import layer

from deepseek_jax.serve import speculate
from deepseek_jax.serve.requests import Request
from deepseek_jax.serve.sampling import Settings, draw

HEAT = 3.0
VOCAB = 6  # small, so that random modules draft some tokens right
REQUESTS = [
    Request((1, 2, 3), 9),
    Request((5,), 14),
    Request((0, 1, 2, 3, 4), 12),
    Request((4,), 1),
]


@functools.cache
def plain():
    """Plain decoding; main models are equal at every depth."""
    return serving.server(serving.model(0, VOCAB), slots=4, steps=4).run(REQUESTS)


@functools.cache
def server(depth, drafts):
    return serving.server(serving.model(depth, VOCAB), slots=4, steps=3, drafts=drafts)


def spread():
    """Layout over nodes and tensor ranks, with unstacked layers."""
    layout = dict(sizes={"node": 2, "gpu": 2, "tensor": 2}, unroll=2, rules=small.NARROW)
    return serving.server(serving.model(1, VOCAB), slots=4, drafts=1, **layout)


@pytest.mark.parametrize(
    "make",
    [functools.partial(server, 3, 3), functools.partial(server, 1, 3), spread],
    ids=["depth 3", "depth 1 reused", "spread"],
)
def test_greedy_tokens_are_those_of_plain_decoding(make):
    own = make()
    own.reset_counts()
    assert own.run(REQUESTS) == plain()
    counts = own.counts
    made = sum(request.max_tokens - 1 for request in REQUESTS)
    assert counts.tokens == made and counts.steps < made  # some drafts were accepted
    assert 0 < counts.accepted[0] < counts.steps
    assert (np.diff(counts.accepted) <= 0).all()


@pytest.mark.parametrize("depth, drafts", [(3, 3), (1, 3)])
def test_drafts_are_those_of_the_training_form(depth, drafts):
    """In the middle of two requests that have taken different numbers of drafts.

    Past the last module its own states stand in for the main model's, one more for each draft.
    """
    model, own = serving.model(depth, VOCAB), server(depth, drafts)
    for seed in range(2):
        own.add(Request((1, 2, 3, 4, 5), 30, temperature=HEAT, seed=seed))
    own.step()
    state = jax.tree.map(jnp.asarray, jax.device_get(own._state))
    own.run([])
    lengths = np.asarray(state.slots.length)[:2]
    assert lengths[0] != lengths[1] and lengths.max() > 10  # 6, and more than one in a step
    run = jax.jit(lambda model, state: speculate.draft(model, serving.HOW, state, drafts))
    _, tokens, q = run(model, state)
    for request, length in enumerate(lengths):
        text = np.concatenate([state.slots.text[request, :length], tokens[request]])
        want = jax.nn.softmax(in_the_training_form(model, text, length, drafts) / HEAT)
        np.testing.assert_allclose(q[request], want, atol=2e-5)


def in_the_training_form(model, text, length, drafts):
    """Logits DV of the drafts at the end of `text`, of which `length` tokens are known."""
    text = jnp.asarray(np.pad(text, (0, 40 - len(text)))[None])  # one shape, one program
    return training_form(model, text, length, drafts)[0]


@functools.partial(jax.jit, static_argnums=3)
def training_form(model, text, length, drafts):
    embedded, depth = model.embedding(text, serving.HOW), model.config.mtp_depth
    state, last, outs = model.trunk(text, serving.HOW).hidden, length - 2, []
    for number in range(1, drafts + 1):
        if number <= depth:
            read = state
        else:
            own = jax.lax.dynamic_index_in_dim(state, last, axis=1)
            last += 1
            read = jax.lax.dynamic_update_index_in_dim(read, own, last, axis=1)
        own = min(number, depth)
        module = layer(model.mtp, own - 1)
        state, out, *_ = module(read, jnp.roll(embedded, -own, axis=1), serving.HOW)
        outs.append(jax.lax.dynamic_index_in_dim(out, last, axis=1, keepdims=False))
    return model.head(jnp.stack(outs, axis=1))


def test_verified_tokens_follow_the_main_model():
    """Two drafts from a wrong distribution: first and second token are as if drawn from p."""
    trials, count = 10_000, 2
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.ones(4), size).astype(np.float32) for size in ((3,), (2,)))
    p[1, 0] = 0  # a draft that is never accepted
    p[1] /= p[1].sum()
    settings = Settings(jnp.ones(trials), jnp.ones(trials), jnp.arange(trials, dtype=jnp.uint32))
    many_p, many_q = (jnp.tile(x[None], (trials, 1, 1)) for x in (p, q))

    @jax.jit
    def run():
        first = jnp.full((trials,), 10)
        made = [draw(many_q[:, i], settings, first + i, speculate.DRAFT) for i in range(count)]
        drafts = jnp.stack(made, axis=1)
        return drafts, *speculate.verify(many_p, many_q, drafts, settings, first)

    drafts, tokens, accepted = map(np.asarray, run())
    order = np.arange(count)[None]
    stand = order < accepted[:, None]
    np.testing.assert_array_equal(tokens[:, :count][stand], drafts[stand])

    def near(tokens, want):
        share = np.bincount(tokens, minlength=4) / len(tokens)
        spread = np.sqrt(want * (1 - want) / len(tokens))
        assert (np.abs(share - want) <= 4 * spread + 1e-9).all()

    near(tokens[:, 0], p[0])
    near(tokens[accepted >= 1, 1], p[1])  # drafts do not depend on one another here
    near(tokens[accepted == 2, 2], p[2])
    kept = np.minimum(p[0], q[0]).sum()
    assert abs((accepted >= 1).mean() - kept) < 4 * np.sqrt(kept * (1 - kept) / trials)
