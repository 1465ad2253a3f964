"""Bad values of requests, engines and arrays of tokens: one line, and never a token of nonsense."""

import jax.numpy as jnp
import numpy as np
import pytest
import serving

from deepseek_jax import api
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import ConfigError
from deepseek_jax.data import tokenizer
from deepseek_jax.hardware import machine_memory
from deepseek_jax.serve import generation, sizes
from deepseek_jax.serve.generation import TextCodec
from deepseek_jax.serve.requests import Request

NAN, INF = float("nan"), float("inf")
NUMBER, WHOLE = "a number from 0 to 1e30", "a whole number, at least 1"
SHARE, SEED = "a number above 0, up to 1", "a whole number, 0 to 2**32 - 1"


@pytest.mark.parametrize(
    "field, value, words",
    [
        *(
            ("temperature", value, NUMBER)
            for value in (-1e-9, NAN, INF, 1e31, "1", None, True, [1])
        ),
        *(("top_p", value, SHARE) for value in (0, -0.5, 1 + 1e-9, NAN, INF, "1", None)),
        *(("seed", value, SEED) for value in (-1, 2**32, 0.5, NAN, "1", None)),
        *(("max_tokens", value, WHOLE) for value in (0, -1, 2.5, NAN, INF, "8", None, True)),
    ],
)
def test_fields_of_a_request(field, value, words):
    with pytest.raises(ConfigError) as error:
        Request(**{"prompt": (1,), "max_tokens": 4, field: value})
    assert str(error.value) == f"request.{field}={value!r}; expected {words}"


@pytest.mark.parametrize("prompt", [None, 3, "ab", (1.0,), (1, None), ([1],), np.ones(2)])
def test_prompts_that_are_no_ids(prompt):
    with pytest.raises(ConfigError, match=r"^request\.prompt has to be token ids, as \(1, 2, 3\)$"):
        Request(prompt, 4)


def test_ids_of_any_integer_type():
    for prompt in ([1, 2], np.array([1, 2], np.uint16), jnp.array([1, 2])):
        assert Request(prompt, np.int64(4)).prompt == (1, 2)
    for prompt in ((-1,), (64,), (10**30,)):
        with pytest.raises(ConfigError, match=r"this model has 0 to 63$"):
            Request(prompt, 4).check_fits(vocab=64, length=48)


@pytest.mark.parametrize(
    "size, words",
    [
        ({"slots": 2**31}, "engine.slots=2147483648; expected at least 1 and at most 2147483647"),
        ({"length": 0}, "engine.length=0; expected at least 1 and at most 2147483647"),
        ({"length": 10**30}, "at least 1 and at most 2147483647"),
        ({"length": 4.5}, "engine.length=4.5"),
        ({"drafts": 49}, "engine.drafts=49; expected at least 0 and at most 48"),
        ({"steps": 0}, "engine.steps=0"),
    ],
    ids=str,
)
def test_sizes_of_an_engine(size, words):
    usual = {"slots": 2, "length": 48, "drafts": 0, "steps": 4}
    with pytest.raises(ConfigError) as error:
        sizes.check_numbers(serving.model().config, **{**usual, **size})
    assert words in str(error.value)


def test_a_cache_that_no_memory_holds(monkeypatch):
    """Told before the weights are read."""
    monkeypatch.setattr(machine_memory, "host_bytes", lambda: 2**30)
    monkeypatch.setattr("deepseek_jax.checkpoint.load.Checkpoint.load", lambda *_: pytest.fail())
    tiny = open_checkpoint(serving.TINY)
    rest = dict(mesh={}, slots=2, cache="float32", stop=(), drafts=0)
    with pytest.raises(ConfigError) as error:
        generation.open_engine(tiny, tiny.config(), length=2**24, **rest)
    assert "engine.length=16777216 tokens (a prompt and its request.max_tokens)" in str(error.value)
    assert "takes 12 GiB of 1 GiB; set a smaller length or fewer engine.slots" in str(error.value)


class Words(TextCodec):
    """Bytes, with the marks of DeepSeek-V3."""

    def __init__(self):
        made = tokenizer.make("byte", vocab=512, texts=())
        super().__init__(serving.TINY, made, (1,))


def test_a_mark_in_a_prompt_is_told_and_can_be_sent(recwarn):
    words, text = Words(), f"a{tokenizer.EOS}b"
    letters = [6 + byte for byte in text.encode()]
    assert words.encode(text) == (0, *letters)
    assert [str(warning.message) for warning in recwarn] == [
        f"the prompt spells out the special token {tokenizer.EOS}, which is encoded as letters; "
        "--special_tokens sends the token itself"
    ]
    recwarn.clear()
    assert words.encode(text, special=True) == (0, 6 + ord("a"), 1, 6 + ord("b"))
    assert words.encode(f"{tokenizer.BOS}a", special=True) == (0, 6 + ord("a"))  # one BOS
    assert words.encode(text[:-9]) == (0, *letters[: len(text[:-9].encode())])
    assert not recwarn
    assert words.encode("<|other|>", special=True) == words.encode("<|other|>")
    assert [str(warning.message) for warning in recwarn] == [
        f"the prompt has <|other|>, which is no special token of {serving.TINY}; it is encoded as "
        "letters"
    ]
    assert words.encode("<|other|>") == (0, *(6 + byte for byte in b"<|other|>"))
    assert len(recwarn) == 1


@pytest.mark.parametrize("text, at", [("a\udcff", 1), ("\ud800", 0)])
def test_a_prompt_that_is_no_text(text, at):
    with pytest.raises(ConfigError, match=f"^a prompt is not UTF-8 text: character {at} is half"):
        Words().encode(text)


def test_prompts_of_nothing_and_of_much():
    assert Words().encode("") == (0,)
    assert Words().encode(" \0\n") == (0, 6 + 32, 6, 6 + 10)
    assert len(Words().encode("a" * 2**20)) == 2**20 + 1


@pytest.mark.parametrize(
    "tokens, words",
    [
        ([], "tokens are float64[0]; expected integers [sequences, length], at least 1 and 1"),
        ([1, 2], "tokens are int64[2]; expected integers"),
        ([[1.0]], "tokens are float64[1, 1]; expected integers"),
        ([[True]], "tokens are bool[1, 1]; expected integers"),
        ([[10**30]], "tokens are object[1, 1]; expected integers"),
        ([[1, 2], [3]], "tokens have rows of unequal lengths; pad them at the end"),
        ([[2**32 + 1]], "tokens go from 4294967297 to 4294967297; expected 0 to 63"),
        ([[-1]], "tokens go from -1 to -1; expected 0 to 63"),
        (np.broadcast_to(1, (2**20, 2**20)), "pass fewer at once"),
    ],
    ids=str,
)
def test_arrays_of_tokens(tokens, words):
    with pytest.raises(ValueError) as error:
        api.Model(serving.model().config, serving.model(), serving.HOW, source=None)(tokens)
    assert words in str(error.value)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float33", 5, []])
def test_dtypes_that_are_not_computed_in(dtype):
    with pytest.raises(ConfigError, match=r"^dtype is .*; expected float32, bfloat16, fp8$"):
        api.load(serving.TINY, dtype)
