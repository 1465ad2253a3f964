"""Begin and end marks under any name: from the settings beside a tokenizer.json."""

import json

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers

from deepseek_jax.config import ConfigError
from deepseek_jax.data import tokenizer

NAMES = ["[BOS]", "[EOS]", "</s>"]  # 2, 3, 4; the last is one of the names that are known


def written(folder, names=NAMES, **beside):
    core = Core(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_tokens(names)
    core.save(str(folder / "tokenizer.json"))
    for name, values in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder / "tokenizer.json"


NAMED = {"bos_token": {"content": "[BOS]", "lstrip": False}, "eos_token": "[EOS]"}


@pytest.mark.parametrize(
    "beside, marks",
    [
        ({"tokenizer_config": NAMED}, (2, 3)),
        ({"generation_config": {"bos_token_id": 2, "eos_token_id": [3, 4]}}, (2, 3)),
        ({"config": {"bos_token_id": 2, "eos_token_id": 3}}, (2, 3)),
        ({"tokenizer_config": {"eos_token": "[EOS]"}, "config": {"eos_token_id": 4}}, (None, 3)),
        ({"generation_config": {"eos_token_id": 3}, "config": {"eos_token_id": 4}}, (None, 3)),
        ({"tokenizer_config": {"bos_token": None}, "config": {"bos_token_id": 2}}, (None, 4)),
        ({"tokenizer_config": {"eos_token": "<gone>"}, "config": {"eos_token_id": 99}}, (None, 4)),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": True}}, (None, 4)),
        ({}, (None, 4)),
    ],
    ids=str,
)
def test_stated_marks_come_before_known_names(beside, marks, tmp_path):
    words = tokenizer.read(written(tmp_path, **beside))
    assert (words.marks.bos, words.marks.eos) == marks
    (ids,) = words.encode(["a [EOS] b"])  # what is a mark is no word of a text
    assert (3 in ids) == (3 not in marks)


def test_a_saved_tokenizer_keeps_its_marks(tmp_path):
    words = tokenizer.read(written(tmp_path, NAMES[:2], tokenizer_config=NAMED))
    (tmp_path / "run").mkdir()
    words.save(tmp_path / "run" / "tokenizer.json")
    assert tokenizer.read(tmp_path / "run" / "tokenizer.json").marks == words.marks
    before = tokenizer.identity(str(tmp_path), 9)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**NAMED, "eos_token": "[BOS]"}))
    assert tokenizer.identity(str(tmp_path), 9) != before


def test_own_tokenizers_say_the_same_to_every_reader(tmp_path):
    """`tokenizers` itself begins a text with BOS, as `generate` does, and finds EOS by name."""
    words = tokenizer.make("byte", vocab=262, texts=())
    words.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]  # known names
    (ids,) = words.encode(["a text"])
    other = Core.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode("a text").ids == [words.marks.bos, *ids]
    assert other.decode(list(ids)) == "a text"
    stated = json.loads(words.settings_for_readers())
    assert other.token_to_id(stated["eos_token"]) == words.marks.eos == 1
    assert other.token_to_id(stated["bos_token"]) == words.marks.bos == 0
    assert stated["tokenizer_class"] == "PreTrainedTokenizerFast" and stated["add_bos_token"]
    assert stated["clean_up_tokenization_spaces"] is False


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", "[" * 100_000])
def test_settings_that_cannot_be_read_are_named(text, tmp_path):
    file = written(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=rf"data.tokenizer: {tmp_path}/tokenizer_config.json"):
        tokenizer.read(file)
