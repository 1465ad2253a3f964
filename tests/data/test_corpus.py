"""Tokenised documents: the cache, the split, token files."""

import dataclasses
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from small_texts import VOCAB, some_texts, write_jsonl

from deepseek_jax.config import ConfigError
from deepseek_jax.data import tokenizer
from deepseek_jax.data.corpus import prepare, split


def bodies(corpus) -> list[list[int]]:
    return [corpus.body(i).tolist() for i in range(len(corpus.spans))]


def test_documents_are_kept_in_order(corpus_of):
    texts = ["", *some_texts(30), ""]
    corpus = corpus_of(texts)
    full = [text for text in texts if text]
    assert [corpus.tokenizer.decode(corpus.body(i)) for i in range(30)] == full
    assert [corpus.text(i).decode() for i in range(30)] == full
    facts = corpus.facts
    assert (facts.documents, facts.held_out_documents, facts.eos) == (30, 3, 1)
    assert facts.bytes == len("".join(full).encode())
    assert facts.tokens == facts.bytes + 2 * 30
    assert facts.tokenizer == "bytes"


@pytest.mark.parametrize(("count", "share", "held"), [(100, 0.1, 10), (10, 0.01, 1), (2, 0.4, 1)])
def test_split_leaves_nobody_out_and_nobody_twice(count, share, held):
    training, held_out = split(count, share)
    assert len(held_out) == held
    assert sorted([*training, *held_out]) == list(range(count))
    again = split(count, share)
    np.testing.assert_array_equal(again[0], training)
    np.testing.assert_array_equal(again[1], held_out)
    assert set(split(count, share / 2)[1]) <= set(held_out)


def test_nothing_held_out(corpus_of):
    corpus = corpus_of(["one document alone"], held_out=0.0)
    assert len(corpus.training) == 1 and len(corpus.held_out) == 0


def test_bpe_is_trained_on_training_documents_alone(corpus_of):
    texts = [f"{'ab' * 30} {number}" for number in range(10)]
    _, (held, *_) = split(10, 0.1)
    texts[held] = "zxqj" * 200
    corpus = corpus_of(texts, tokenizer="bpe")
    assert len(corpus.body(held)) == 800  # the tokenizer has no merge for it
    assert all(len(corpus.body(i)) < 20 for i in corpus.training)


def test_second_opening_reads_the_cache(corpus_of, monkeypatch):
    texts = some_texts(30)
    first = corpus_of(texts, tokenizer="bpe")

    def again(*args, **kwargs):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokenizer, "make", again)
    second = corpus_of(texts, tokenizer="bpe")
    assert bodies(first) == bodies(second)
    assert (first.digest, first.facts) == (second.digest, second.facts)


def test_other_content_is_another_entry(corpus_of, config):
    digests = {corpus_of(some_texts(30, seed)).digest for seed in range(3)}
    digests |= {corpus_of(some_texts(30), held_out=0.2).digest}
    digests |= {corpus_of(some_texts(30), tokenizer="bpe").digest}
    assert len(digests) == 5
    assert len(list(Path(config.cache).iterdir())) == 5


def test_a_failed_build_leaves_nothing(corpus_of, config, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of patience")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "make", fail)
        with pytest.raises(RuntimeError, match="patience"):
            corpus_of(some_texts(30))
    assert not list(Path(config.cache).iterdir())
    assert len(corpus_of(some_texts(30)).spans) == 30


def _prepare(config, start, results):
    start.wait()
    results.put(prepare(config, vocab=VOCAB).digest)


def test_concurrent_builds_agree(config, tmp_path):
    path = write_jsonl(tmp_path / "texts.jsonl", some_texts(300))
    config = dataclasses.replace(config, path=path, tokenizer="bpe")
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Barrier(3), spawn.Queue()
    workers = [spawn.Process(target=_prepare, args=(config, start, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    digests = {results.get(timeout=50) for _ in workers}
    for worker in workers:
        worker.join()
    assert digests == {prepare(config, vocab=VOCAB).digest}
    assert len(list(Path(config.cache).iterdir())) == 1


def test_default_cache_is_the_users(config, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "texts.jsonl", some_texts(30))
    config = dataclasses.replace(config, path=path, cache="")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    prepare(config, vocab=VOCAB)
    assert list((tmp_path / "xdg" / "deepseek_jax").iterdir())
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    prepare(config, vocab=VOCAB)
    assert list((tmp_path / "home" / ".cache" / "deepseek_jax").iterdir())


def test_unusable_caches_are_named(corpus_of, config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written.*set data\.cache"):
        corpus_of(some_texts(30), cache=str(tmp_path / "file"))


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "meta.json", "tokenizer.json"])
def test_a_damaged_cache_is_made_again(corpus_of, config, name):
    first = corpus_of(some_texts(30))
    (entry,) = Path(config.cache).iterdir()
    for damage in (b"\0\0", b"", b"{}", None):
        (entry / name).unlink()
        if damage is not None:
            (entry / name).write_bytes(damage)
        said: list[str] = []
        again = corpus_of(some_texts(30), said.append)
        assert bodies(again) == bodies(first) and again.digest == first.digest
        assert [line for line in said if f"{entry} is damaged" in line]
        assert sorted(Path(config.cache).iterdir()) == [entry]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 1.0}, r"data\.held_out=1\.0"),
        ({"held_out": -0.1}, r"data\.held_out=-0\.1"),
        ({"held_out": 0.99}, r"data\.path holds 30 documents.*data\.held_out=0\.99"),
        ({"fim_rate": 1.5}, r"data\.fim_rate=1\.5"),
        ({"tokenizer": "nothing"}, r"data\.tokenizer='nothing'"),
    ],
)
def test_bad_values_are_named(corpus_of, changes, message):
    with pytest.raises(ConfigError, match=message):
        corpus_of(some_texts(30), **changes)


def test_too_few_documents(corpus_of):
    with pytest.raises(ConfigError, match=r"data\.path holds 1 documents.*data\.held_out=0"):
        corpus_of(["one", "", ""])
    with pytest.raises(ConfigError, match=r"data\.path holds 0 documents"):
        corpus_of(["", ""])


def test_fim_needs_marks(corpus_of, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.BPE({chr(97 + i): i for i in range(26)} | {"</s>": 26}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel()
    core.save(str(tmp_path / "tokenizer.json"))
    given = {"tokenizer": str(tmp_path / "tokenizer.json")}
    with pytest.raises(ConfigError, match=r"data\.fim_rate=0\.5.*no fill-in-the-middle marks"):
        corpus_of(["abc"] * 30, **given)
    corpus = corpus_of(["abc"] * 30, fim_rate=0.0, **given)
    assert bodies(corpus) == [[0, 1, 2]] * 30
    assert corpus.marks.bos is None and corpus.around == 1


@pytest.mark.parametrize(
    "kind", ["uint16.npy", "uint32.npy", "int64.npy", "<u2", "<u4", "large <u4"]
)
def test_token_files(config, tmp_path, kind):
    documents = [[7, 8, 9], [10], [11, 12]] * 10
    ids = np.array([i for body in documents for i in [0, *body, 1]])
    file, vocab = tmp_path / "tokens.bin", VOCAB
    if kind.endswith("npy"):
        file = tmp_path / "tokens.npy"
        np.save(file, ids.astype(kind.split(".")[0]))
    else:
        vocab = 1 << 17 if kind.startswith("large") else VOCAB
        ids.astype(kind.split()[-1]).tofile(file)
    said = []
    config = dataclasses.replace(config, path=str(file), tokenizer="bpe")
    corpus = prepare(config, vocab=vocab, say=said.append)
    assert bodies(corpus) == documents
    assert (corpus.marks.bos, corpus.marks.eos, corpus.marks.fim) == (0, 1, (13, 14, 15))
    assert corpus.facts.tokens == len(ids)
    assert corpus.text(0) == np.array([7, 8, 9], corpus.shards[0].ids.dtype).tobytes()
    assert any("id 1" in line for line in said)


def test_folder_of_token_shards(config, tmp_path):
    (tmp_path / "t").mkdir()
    np.save(tmp_path / "t" / "a.npy", np.array([7, 1, 1, 8, 9], np.uint16))
    np.save(tmp_path / "t" / "b.npy", np.array([10, 11, 1, 12, 1], np.uint32))
    config = dataclasses.replace(config, path=str(tmp_path / "t"))
    corpus = prepare(config, vocab=VOCAB)
    assert bodies(corpus) == [[7], [8, 9], [10, 11], [12]]
    assert corpus.marks.bos is None
    assert corpus.text(0) == b"\x01"  # byte 1, by the byte tokenizer that the config names


def test_token_stream_without_ends(config, tmp_path):
    ids = np.arange(2, 402).repeat(50).astype(np.uint16)
    np.save(tmp_path / "a.npy", ids)
    corpus = prepare(
        dataclasses.replace(config, path=str(tmp_path / "a.npy"), tokenizer="bpe"), vocab=VOCAB
    )
    assert np.concatenate([corpus.body(i) for i in range(len(corpus.spans))]).tolist() == list(ids)
    assert len(corpus.spans) > 50


@pytest.mark.parametrize(
    ("array", "changes", "message"),
    [
        (np.array([600, 1, 5], np.uint16), {}, r"model\.vocab=512 .*at least 601"),
        (np.array([300, 1, 5], np.uint16), {"tokenizer": "byte"}, r"data\.tokenizer .*that wrote"),
        (
            np.array([511, 1, 5], np.uint16),
            {},
            r"data\.fim_rate=0\.5.*at least 515",
        ),
        (np.array([-3, 1, 5], np.int32), {}, r"data\.path: .*id -3"),
        (np.zeros((2, 2), np.uint16), {}, r"data\.path: .*\(2, 2\)"),
        (np.zeros(4, np.float32), {}, r"data\.path: .*float32"),
        (np.zeros(0, np.uint16), {}, r"data\.path: .*is empty"),
        (np.array([5, 6, 1], np.uint16), {"held_out": 0.5}, r"data\.path holds 1 documents"),
    ],
)
def test_bad_token_files_are_named(config, tmp_path, array, changes, message):
    np.save(tmp_path / "a.npy", array)
    config = dataclasses.replace(config, path=str(tmp_path / "a.npy"), tokenizer="bpe")
    with pytest.raises(ConfigError, match=message):
        prepare(dataclasses.replace(config, **changes), vocab=VOCAB)


def test_token_files_that_are_something_else(config, tmp_path):
    (tmp_path / "a.npy").write_text("text")
    (tmp_path / "a.bin").write_bytes(b"odd")
    (tmp_path / "b.bin").write_bytes(b"")
    for name, message in [
        ("a.npy", "not a NumPy array"),
        ("a.bin", "has 3 bytes"),
        ("b.bin", "is empty"),
    ]:
        with pytest.raises(ConfigError, match=rf"data\.path: .*{message}"):
            prepare(dataclasses.replace(config, path=str(tmp_path / name)), vocab=VOCAB)
