"""A tokenizer.json of every damage: one line that names it."""

import json
import os

import pytest
from faults.bad_files import PROSE, lines, refusal, small

from deepseek_jax.data import tokenizer


@pytest.fixture
def config(tmp_path):
    return small(tmp_path)


def made_tokenizer(**changes) -> bytes:
    core = json.loads(tokenizer.make("byte", vocab=512, texts=())._core.to_str())
    for key, value in changes.items():
        core[key] = value
    return json.dumps(core).encode()


def no_unknown() -> bytes:
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return core.to_str().encode()


EMPTY_MODEL = {"type": "BPE", "vocab": {}, "merges": []}
TOKENIZERS = {
    "empty": (b"", "not a tokenizer.json"),
    "words": (PROSE, "not a tokenizer.json"),
    "binary": (b"\x80\4\x95\0\xff" * 9, "not a tokenizer.json"),
    "list": (b"[]", "not a tokenizer.json"),
    "number": (b"7", "not a tokenizer.json"),
    "object": (b"{}", "not a tokenizer.json"),
    "deep": (b"[" * 100_000, "not a tokenizer.json.*deeply"),
    "cut": (made_tokenizer()[:-9], "not a tokenizer.json"),
    "no_model": (made_tokenizer(model=None), "not a tokenizer.json"),
    "other_model": (made_tokenizer(model={"type": "Other"}), "not a tokenizer.json"),
    "strange_marks": (made_tokenizer(added_tokens=[{"content": ["a"]}]), "not a tokenizer.json"),
    "no_marks": (made_tokenizer(added_tokens=7), "not a tokenizer.json"),
    "a_gap": (
        made_tokenizer(
            added_tokens=[
                {
                    "id": number,
                    "content": name,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for name, number in {"</s>": 262, "<new>": 400}.items()
            ]
        ),
        "gives the token '<new>' the id 400, and the tokenizers library reads it as 263; number",
    ),
    "no_tokens": (made_tokenizer(model=EMPTY_MODEL, added_tokens=[]), "has no tokens"),
    "no_unknown": (no_unknown(), "cannot encode the text"),
    "long_words": (made_tokenizer(model="x" * 9999), "not a tokenizer.json"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_bad_tokenizer_is_named(config, tmp_path, name):
    content, words = TOKENIZERS[name]
    (tmp_path / "data").write_bytes(PROSE)
    (tmp_path / "tokenizer.json").write_bytes(content)
    message = refusal(config, words, tokenizer=str(tmp_path))
    assert message.startswith("data.tokenizer: ") and "tokenizer.json" in message


def test_tokenizers_that_are_no_files(config, tmp_path):
    (tmp_path / "data").write_bytes(PROSE)
    (tmp_path / "tokenizer.json").mkdir()
    assert refusal(config, "nor a tokenizer.json", tokenizer=str(tmp_path))
    assert refusal(config, "nor a tokenizer.json", tokenizer="/dev/zero")
    if os.path.exists("/proc/self/mem"):
        assert refusal(config, "/proc/self/mem cannot be read", tokenizer="/proc/self/mem")


def test_messages_are_short(config, tmp_path):
    (tmp_path / "data").write_bytes(lines())
    file = tmp_path / "data.jsonl"
    (tmp_path / "data").rename(file)
    message = refusal(config, "data.text_key='kkk", text_key="k" * 5000, path=str(file))
    assert "it has keys 'id', 'text'" in message
