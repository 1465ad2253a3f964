"""Requests that share a batch: each gets the tokens that it gets alone, on any layout."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving

import deepseek_jax
from deepseek_jax.config import ConfigError
from deepseek_jax.errors import RunError
from deepseek_jax.model import decoding
from deepseek_jax.serve import latent_cache
from deepseek_jax.serve.batch_state import Slots
from deepseek_jax.serve.requests import Request
from deepseek_jax.serve.sampling import Settings

TINY = Path(__file__).parents[1] / "fixtures" / "hf_tiny"
LOGITS = 2e-4  # between independent float32 implementations (the fixture's own)


@pytest.fixture(scope="module")
def expected():
    with np.load(TINY / "expected.npz") as values:
        return dict(values)


@pytest.fixture(scope="module")
def tiny():
    return deepseek_jax.load(TINY)


@pytest.fixture(scope="module")
def fixture_server():
    return serving.opened(TINY)


def ids(rows):
    return [tuple(int(token) for token in row) for row in rows]


def test_tokens_of_the_fixture(fixture_server, expected):
    made = fixture_server.run(Request(prompt, 24) for prompt in ids(expected["gen_prompt"]))
    np.testing.assert_array_equal(made, expected["gen_tokens"])
    counts = fixture_server.counts
    assert (counts.prompt_tokens, counts.tokens, counts.steps) == (16, 46, 46)


def test_logits_of_the_fixture(tiny, expected):
    """The prompt through prefill, all generated tokens through one forward of the decoding form."""
    prompt, made = expected["gen_prompt"], expected["gen_tokens"]

    @jax.jit
    def run(model, prompt, made):
        top, kept = decoding.prefill(model, prompt, tiny.how, mtp=False)
        past = latent_cache.make(model.config, 2, 32, "float32", mtp=False)
        rows = jnp.arange(2)
        past = past.admit(rows, kept)
        positions = prompt.shape[1] + jnp.tile(jnp.arange(23)[None], (2, 1))
        more, _ = decoding.decode(model, made[:, :-1], tiny.how, past, positions)
        return model.head(jnp.concatenate([top[:, -1:], more], axis=1))

    got = run(tiny.weights, jnp.asarray(prompt), jnp.asarray(made))
    np.testing.assert_allclose(got, expected["gen_step_logits"], rtol=0, atol=LOGITS)


REQUESTS = [
    Request((1, 2, 3), 9),
    Request((9,), 14, temperature=1.0, seed=3),
    Request(tuple(range(20, 33)), 5, temperature=0.7, top_p=0.8, seed=3),
    Request((4, 4), 12),
    Request((7, 50, 3, 2), 1),
    Request((1, 2, 3), 9, temperature=1.0, seed=4),
]


@functools.cache
def one_device():
    return serving.server(serving.model(), steps=4)


@functools.cache
def alone():
    """Tokens of each request in a batch of its own."""
    server = one_device()
    return [server.run([request])[0] for request in REQUESTS]


def test_neighbours_change_nothing():
    """Six requests share two slots, joining as others leave."""
    server = one_device()
    want = alone()
    assert [len(tokens) for tokens in want] == [r.max_tokens for r in REQUESTS]
    assert server.run(REQUESTS) == want
    assert not server.busy


def test_greedy_is_what_the_whole_model_says():
    request, made = REQUESTS[0], alone()[0]
    model = serving.model()
    text = jnp.array([request.prompt + tuple(made)])
    logits, _ = model(text, serving.HOW)
    np.testing.assert_array_equal(logits[0, 0, 2:-1].argmax(-1), made)


LAYOUTS = {
    "experts": dict(sizes={"gpu": 8}),
    "replicas, zero 3": dict(sizes={"replica": 2, "gpu": 2, "tensor": 2}, zero=3),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_layout_changes_nothing(layout):
    """The fourth request ends at a token that stops it here; see also test_speculate.py."""
    stop = alone()[3][4]
    server = serving.server(serving.model(), slots=8, steps=4, stop=(stop,), **layout)
    want = [made[: made.index(stop) + 1] if stop in made else made for made in alone()]
    assert len(want[3]) <= 5
    assert server.run(REQUESTS) == want


def test_slots_are_extended_up_to_limit_and_stop():
    """The first slot does not run; the others end by limit, by stop token, and not yet."""
    nothing = Settings(*jnp.zeros((2, 4)), jnp.zeros(4, jnp.uint32))
    slots = Slots(
        text=jnp.zeros((4, 8), jnp.int32),
        length=jnp.array([3, 2, 2, 0]),
        limit=jnp.array([3, 4, 8, 8]),
        settings=nothing,
    )
    tokens = jnp.array([[5, 6, 7]] * 4)
    slots, count = slots.extended(tokens, jnp.array([3, 3, 3, 1]), stop=(6,))
    assert count.tolist() == [0, 2, 2, 1]
    assert slots.length.tolist() == [3, 4, 4, 1]
    assert slots.running.tolist() == [False, False, False, True]
    assert slots.text[:, :5].tolist() == [
        [0] * 5,
        [0, 0, 5, 6, 0],
        [0, 0, 5, 6, 0],
        [5, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"prompt": ()}, "empty prompt"),
        ({"prompt": (64,)}, "tokens from 64 to 64; this model has 0 to 63"),
        ({"max_tokens": 0}, "request.max_tokens=0"),
        ({"temperature": -1.0}, "request.temperature=-1.0"),
        ({"temperature": float("nan")}, "request.temperature=nan"),
        ({"top_p": 0.0}, "request.top_p=0.0"),
        ({"seed": -1}, "request.seed=-1"),
        (
            {"prompt": (1,) * 40, "max_tokens": 9},
            "need room for 49, and a slot has 48; set engine.length=49",
        ),
    ],
)
def test_what_can_never_run_is_refused(given, reason):
    with pytest.raises(ConfigError, match=reason):
        one_device().add(Request(**{"prompt": (1,), "max_tokens": 4, **given}))
    assert not one_device().busy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_the_run(temperature, monkeypatch):
    """The programs get weights of NaN; the engine's own state stays as it was."""
    own = one_device()
    own.run([Request((1, 2, 3), 5, temperature)])  # compiles
    state = jax.tree.map(jnp.copy, own._state)
    weights, bias = own._admit._held
    for program in (own._admit, own._decode):
        monkeypatch.setattr(program, "_held", (jax.tree.map(lambda x: x * np.nan, weights), bias))
        own.add(Request((1, 2, 3), 5, temperature))
        with pytest.raises(RunError, match=r"^the logits of request \d+ are not finite, so no"):
            own.step()
        monkeypatch.undo()
        own._state, own._held = jax.tree.map(jnp.copy, state), [None] * own.slots


def test_sizes_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"set engine\.slots=8"):
        serving.server(serving.model(), {"gpu": 8}, slots=6)
    with pytest.raises(ConfigError, match=r"engine\.slots=0; expected at least 1"):
        serving.server(serving.model(), slots=0)
    with pytest.raises(ConfigError, match=r"engine\.drafts=-1; expected at least 0"):
        serving.server(serving.model(), drafts=-1)
    with pytest.raises(ConfigError, match=r"this model has none; set engine\.drafts=0"):
        serving.server(serving.model(), drafts=1)
