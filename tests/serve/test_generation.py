"""Generation from the command line: folders with and without a tokenizer, output, bad input."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import serving

from deepseek_jax import command
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import ConfigError, values
from deepseek_jax.precision import recipes
from deepseek_jax.serve import generation
from deepseek_jax.serve.generation import TextCodec
from deepseek_jax.serve.requests import Request

TINY = serving.TINY


@pytest.mark.smoke
def test_the_command_tells_the_tokens_of_the_fixture():
    with np.load(TINY / "expected.npz") as expected:
        prompts, want = expected["gen_prompt"], expected["gen_tokens"]
    flags = [f"--prompt_tokens={','.join(map(str, prompt))}" for prompt in prompts]
    flags += [f"--checkpoint={TINY}", "--max_tokens=24", "--config=configs/v3_tiny.py"]
    flags += ["--temperature=0"]
    flags += ["--config.layout.unroll=1"]  # quick to compile
    done = runs.start([sys.executable, "-m", "deepseek_jax.generate", "--json", *flags])
    out, errors = done.communicate()
    assert done.returncode == 0, errors
    found = json.loads(out)
    np.testing.assert_array_equal([r["tokens"] for r in found["requests"]], want)
    assert [r["text"] for r in found["requests"]] == [None, None]
    assert found["timing"]["decode_tokens_per_second"] > 0
    assert "acceptance" not in found["timing"]
    assert found["sampling"]["temperature"] == 0 and found["sampling"]["top_p_from"] == "default"
    assert {r["finish_reason"] for r in found["requests"]} == {"length"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The fixture with a tokenizer of bytes beside it."""
    return serving.fill(tmp_path_factory.mktemp("checkpoint"))


def test_text_is_told_as_it_comes(folder):
    words = TextCodec.of(open_checkpoint(folder))
    assert words.stop == (1,)
    prompt = words.encode("añ")
    assert prompt == (0, 6 + ord("a"), 6 + 0xC3, 6 + 0xB1)
    server = serving.opened(folder)
    several: list[str] = []
    found = generation.generate(
        server, [Request(prompt, 3), Request((7,), 2)], words, several.append
    )
    texts = [request["text"] for request in found["requests"]]
    assert several == [f"[{number}] {text}\n" for number, text in enumerate(texts)]
    told: list[str] = []
    found = generation.generate(server, [Request(prompt, 20)], words, told.append, ["añ"])
    assert len(told) > 3 and "".join(told) == "añ" + found["requests"][0]["text"] + "\n"


def test_half_a_character_waits(folder):
    words = TextCodec.of(open_checkpoint(folder))
    whole = words.encode("é")[1:]
    assert generation._so_far(words, whole[:1], False) == ""
    assert generation._so_far(words, whole, False) == "é"


def test_a_recipe_called_fp8_does_not_make_the_cache_fp8(monkeypatch):
    recipe = recipes.Recipe("fp8", jnp.dtype(jnp.bfloat16))
    monkeypatch.setitem(recipes._RECIPES, "fp8", recipe)
    base = command.default_config()
    monkeypatch.setitem(values._CHOICES, "precision.recipe", ("fp8",))
    precision = dataclasses.replace(base.precision, recipe="fp8")
    base = dataclasses.replace(base, precision=precision)
    rest = dict(mesh={}, slots=1, length=40, stop=(), drafts=0)
    for asked, kinds in ((None, {"bfloat16"}), ("fp8", {"float8_e4m3fn", "uint8", "bfloat16"})):
        server = generation.open_engine(open_checkpoint(TINY), base, cache=asked, **rest)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(server._state.cache)} == kinds


def test_bad_input_gets_one_message(folder):
    with pytest.raises(ConfigError, match=r"no tokenizer\.json .* give prompt_tokens"):
        TextCodec.of(open_checkpoint(TINY)).encode("a")
    tiny, base = open_checkpoint(TINY), command.default_config()
    rest = dict(slots=1, length=40, cache="bfloat16", stop=())
    with pytest.raises(ConfigError, match="generation has no pipeline"):
        generation.open_engine(tiny, base, mesh={"pipe": 2, "gpu": 4}, drafts=0, **rest)
    with pytest.raises(ConfigError, match=r"engine\.drafts=1 drafts with MTP modules"):
        generation.open_engine(tiny, base, mesh={}, drafts=1, **rest)
