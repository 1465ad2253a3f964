"""Drafts are the training form's, verification changes no token and no distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving

from deepseek_jax.api import Model
from deepseek_jax.serve import speculate
from deepseek_jax.serve.sampling import Settings, draw
from deepseek_jax.serve.server import Request

VOCAB = 6  # so small that random modules guess right now and then
REQUESTS = [
    Request((1, 2, 3), 9),
    Request((5,), 14),
    Request((0, 1, 2, 3, 4), 12),
    Request((4,), 1),
]


@functools.cache
def plain(depth):
    return serving.server(serving.model(depth, VOCAB), steps=4).run(REQUESTS)


@pytest.mark.parametrize(
    "depth, drafts, sizes",
    [(1, 1, {}), (2, 2, {"gpu": 2, "tensor": 2}), (1, 3, {"node": 2, "gpu": 2, "tensor": 2})],
)
def test_greedy_tokens_are_those_of_plain_decoding(depth, drafts, sizes):
    server = serving.server(serving.model(depth, VOCAB), sizes, slots=4, steps=4, drafts=drafts)
    assert server.run(REQUESTS) == plain(depth)
    counts = server.counts
    made = sum(request.max_tokens - 1 for request in REQUESTS)
    assert counts.tokens == made and counts.steps < made  # some drafts were taken
    assert 0 < counts.accepted[0] < counts.steps
    assert (np.diff(counts.accepted) <= 0).all()


@pytest.mark.parametrize("depth, drafts", [(1, 1), (3, 3)])
def test_drafts_are_those_of_the_training_form(depth, drafts):
    """In the middle of two requests that have taken different numbers of drafts."""
    model = serving.model(depth, VOCAB)
    server = serving.server(model, steps=3, drafts=drafts)
    for seed in range(2):
        server.add(Request((1, 2, 3, 4, 5)[seed:], 30, temperature=1.5, seed=seed))
    server.step()
    state = jax.tree.map(jnp.asarray, jax.device_get(server._state))
    lengths = np.asarray(state.slots.length)
    assert lengths[0] != lengths[1] and server.counts.accepted[0] > 0
    run = jax.jit(lambda model, state: speculate.draft(model, serving.HOW, state, drafts))
    _, tokens, q = run(model, state)
    whole = Model(model.config, model, serving.HOW)
    for request, length in enumerate(lengths):
        text = np.concatenate([state.slots.text[request, :length], tokens[request]])
        for module, logits in enumerate(whole(text[None]).mtp_logits):
            want = jax.nn.softmax(logits[0, length - 2] / 1.5)
            np.testing.assert_allclose(q[request, module], want, atol=2e-5)


def test_verified_tokens_follow_the_main_model():
    """Two drafts from a wrong distribution: first and second token are as if drawn from p."""
    trials, count = 40_000, 2
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.ones(4), size).astype(np.float32) for size in ((3,), (2,)))
    p[1, 0] = 0  # a draft that can never stand
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
