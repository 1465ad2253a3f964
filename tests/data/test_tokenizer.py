"""Tokenizers: exact round trips, marks by name, and ids below the vocabulary size."""

import importlib.metadata
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_texts import some_texts
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from deepseek_jax.config import ConfigError
from deepseek_jax.data import tokenizer
from deepseek_jax.data.tokenizer import FIM, OWN_MARKS, SMALLEST_BPE

STRANGE = [
    "",
    " ",
    "\r\n\t  \n\n\n   x",
    "naïve 東京 🎉👨‍👩‍👧 \u202e\ufeff\x00\x1f",
    "def f(x):\n        return x ** 2, 'a1234567'\n",
    "".join(OWN_MARKS) + "<|endoftext|>",
]


def all_of(words, texts):
    return list(words.encode(texts))


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.make("bpe", vocab=400, texts=some_texts(200))


@pytest.fixture(scope="module")
def plain():
    return tokenizer.make("byte", vocab=SMALLEST_BPE, texts=())


def test_marks_have_their_ids(bpe, plain):
    for words in (bpe, plain):
        assert (words.marks.bos, words.marks.eos, words.marks.fim) == (0, 1, (3, 4, 5))
    assert SMALLEST_BPE < bpe.size <= 400
    assert plain.size == SMALLEST_BPE == 262


def test_bytes_are_bytes(plain):
    text = STRANGE[3] + STRANGE[5]
    (ids,) = all_of(plain, [text])
    assert bytes((ids - 6).astype(np.uint8)) == text.encode()


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(bpe, plain, text):
    for words in (bpe, plain):
        (ids,) = all_of(words, [text])
        assert words.decode(ids) == text
        assert ids.dtype == np.int32
        assert not np.isin(ids, range(6)).any()  # marks spelt out in a text are only text


def test_strange_texts_in_batches(bpe, monkeypatch):
    monkeypatch.setattr(tokenizer, "_BATCH_CHARACTERS", 100)
    texts = STRANGE * 3 + some_texts(50)
    assert [bpe.decode(ids) for ids in all_of(bpe, texts)] == texts


def test_bpe_compresses_and_is_the_same_every_time(bpe, tmp_path):
    texts = some_texts(200)
    again = tokenizer.make("bpe", vocab=400, texts=texts)
    for file, words in (("a", bpe), ("b", again)):
        words.save(tmp_path / file)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sum(map(len, all_of(bpe, texts))) < sum(len(t.encode()) for t in texts) / 2


def test_no_token_swallows_a_text_without_spaces():
    text = "天地玄黄宇宙洪荒" * 500
    words = tokenizer.make("bpe", vocab=600, texts=[text] * 5)
    (ids,) = all_of(words, [text])
    assert len(ids) >= len(text.encode()) / tokenizer.LONGEST_TOKEN


def test_saved_tokenizer_is_the_same_one(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    for name in (tmp_path / "tokenizer.json", tmp_path):
        words = tokenizer.make(str(name), vocab=400, texts=())
        assert words.marks == bpe.marks
        for text in STRANGE:
            np.testing.assert_array_equal(all_of(words, [text])[0], all_of(bpe, [text])[0])


def file_with(tmp_path, *marks: str, special: bool = False):
    """A tokenizer.json of a few words, padding and truncation switched on."""
    core = Core(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(list(marks)) if special else core.add_tokens(list(marks))
    core.enable_padding(length=8)
    core.enable_truncation(4)
    core.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def test_given_tokenizers_keep_their_own_names(tmp_path):
    names = ["<|endoftext|>", "<s>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    words = tokenizer.make(file_with(tmp_path, *names), vocab=8, texts=())
    assert (words.marks.eos, words.marks.bos, words.marks.fim) == (3, 4, (5, 6, 7))
    (ids,) = all_of(words, ["a b a b a b"])  # neither padded nor cut
    assert list(ids) == [0, 1, 0, 1, 0, 1]


def test_fim_marks_flagged_as_words_are_not_found_in_text(tmp_path):
    words = tokenizer.make(file_with(tmp_path, "</s>", *FIM), vocab=8, texts=())
    (ids,) = all_of(words, [f"a {FIM[0]} b"])
    assert not set(ids) & set(words.marks.fim)


def test_deepseek_by_file(tmp_path, monkeypatch):
    file = file_with(tmp_path, tokenizer.BOS, tokenizer.EOS, *FIM)
    here = importlib.metadata.PackagePath("tokenizer.json")
    here.dist = importlib.metadata.PathDistribution(tmp_path / "x.dist-info")
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [here])
    assert tokenizer.identity("deepseek", 9) == tokenizer.identity(file, 9)
    assert tokenizer.make("deepseek", vocab=8, texts=()).marks.fim == (5, 6, 7)


def test_deepseek_without_its_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ConfigError, match=r"data\.tokenizer='deepseek'.*\[tokenizer\]"):
        tokenizer.make("deepseek", vocab=1 << 17, texts=())


def test_bad_tokenizers_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer='bep'.*'bpe', 'byte' or 'deepseek'"):
        tokenizer.make("bep", vocab=400, texts=())
    (tmp_path / "bad.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*bad\.json is not a tokenizer"):
        tokenizer.make(str(tmp_path / "bad.json"), vocab=400, texts=())
    with pytest.raises(ConfigError, match=r"data\.tokenizer.*no end-of-text mark"):
        tokenizer.make(file_with(tmp_path, "<s>"), vocab=400, texts=())


def test_vocabulary_needs_room(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.vocab=261 .*at least 262"):
        tokenizer.make("bpe", vocab=261, texts=["x"])
    with pytest.raises(ConfigError, match=r"model\.vocab=261 .*at least 262"):
        tokenizer.make("byte", vocab=261, texts=())
    with pytest.raises(ConfigError, match=r"model\.vocab=3 .*at least 4"):
        tokenizer.make(file_with(tmp_path, "</s>"), vocab=3, texts=())


# The pattern of version 0.1.0, whose time grew with the square of a run of blank lines.
_OLDER_INDENT = r"[\r\n]+[ \t]*(?=[ \t]\S)"
OLDER_WORDS = (
    r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+"
    rf"| ?[^\s\p{{L}}\p{{N}}]+(?:{_OLDER_INDENT}|[\r\n]+)?"
    rf"|\s*{_OLDER_INDENT}|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def cut(words: str, text: str) -> list[tuple[str, tuple[int, int]]]:
    return pre_tokenizers.Split(Regex(words), "isolated").pre_tokenize_str(text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from(" \t\r\n\x0b\u2003ab1=é"), max_size=30) | st.text())
def test_words_are_those_of_older_tokenizers(text):
    assert cut(tokenizer.WORDS, text) == cut(OLDER_WORDS, text)


def test_long_words_are_cut_for_training_alone():
    """A text without spaces is counted in pieces, which other texts do not notice."""
    text, short = "天地玄黄" * 3000, some_texts(50)
    words = tokenizer.make("bpe", vocab=500, texts=[text, *short])
    size = tokenizer.LONGEST_WORD
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    again = tokenizer.make("bpe", vocab=500, texts=[*pieces, *short])
    assert words._core.to_str() == again._core.to_str()
    pattern, _ = json.loads(words._core.to_str())["pre_tokenizer"]["pretokenizers"]
    assert pattern["pattern"]["Regex"] == tokenizer.WORDS


@pytest.mark.slow
@pytest.mark.parametrize("text", ["\n" * 10**6, "\n   " * 10**5, "x" * 10**6, "=" * 10**6])
def test_runs_of_one_character_end(text):
    words = tokenizer.make("bpe", vocab=512, texts=[text])
    assert words.decode(next(words.encode([text]))) == text
