"""Packing for scoring: every token is a target once, and bytes are those of the documents."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
from small_texts import some_texts

from deepseek_jax.config import ConfigError
from deepseek_jax.data import tokenizer as tokenizers
from deepseek_jax.data.corpus import prepare
from deepseek_jax.data.packing import Stream
from deepseek_jax.data.scoring import held_out, lay_out, of_text, of_tokens, trained
from deepseek_jax.data.source import open_source


def targets(laid) -> list[int]:
    return laid.sequences[:, 1:][laid.valid].tolist()


@pytest.mark.parametrize("length", [1, 16, 10_000])
def test_every_token_is_a_target_once(corpus_of, length):
    corpus = corpus_of(some_texts(40), fim_rate=1.0)
    laid = held_out(corpus, length=length, tokens=10**6)
    texts = [corpus.text(i) for i in corpus.held_out]
    stream = [token for text in texts for token in (0, *(byte + 6 for byte in text), 1)]
    assert laid.documents == 4
    assert laid.sequences.shape[1] == length + 1 and laid.sequences.dtype == np.int32
    assert laid.valid.shape == (len(laid.sequences), length) and laid.valid.dtype == bool
    assert laid.sequences[0, 0] == stream[0]
    assert targets(laid) == stream[1:]
    np.testing.assert_array_equal(laid.sequences[1:, 0], laid.sequences[:-1, -1])
    assert laid.bytes == len(b"".join(texts))
    assert laid.gzip_bytes == len(gzip.compress(b"".join(texts), 9))
    assert laid.valid.any(axis=1).all()


def test_the_budget_is_met_exactly_and_no_document_is_left_out_for_its_length(corpus_of):
    texts = [("ñ" if n % 2 else "x") * (400 if n % 3 else 30) + str(n) for n in range(100)]
    corpus = corpus_of(texts)
    whole = [(corpus.text(i), corpus.body(i).tolist()) for i in corpus.held_out]
    stream = [token for _, body in whole for token in (0, *body, 1)]
    for tokens in (1, 31, 32, 33, 500, 1000, len(stream) - 1):
        laid = held_out(corpus, length=16, tokens=tokens)
        assert targets(laid) == stream[1 : tokens + 1]
        spelt = bytes(token - 6 for token in stream[: tokens + 1] if token >= 6)
        assert laid.bytes == len(spelt.decode(errors="ignore").encode()) + 2 * _is_cut(spelt)
    assert laid.documents == len(whole) == 10
    assert laid.gzip_bytes == len(gzip.compress(b"".join(text for text, _ in whole), 9))


def _is_cut(data: bytes) -> bool:
    """Whether a text of one- and two-byte characters ends inside one."""
    return len(data.decode(errors="ignore").encode()) < len(data)


def test_training_text_is_of_training_documents_in_a_fixed_random_order(corpus_of):
    texts = [f"{number:03}" * 5 for number in range(60)]
    corpus = corpus_of(texts)
    laid = trained(corpus, length=16, tokens=300)
    found = bytes(token - 6 for token in targets(laid) if token >= 6).decode()
    drawn = [found[i : i + 3] for i in range(0, len(found) - 14, 15)]
    held = {texts[i][:3] for i in corpus.held_out}
    assert laid.valid.sum() == 300 and len(drawn) == 17 and not held & set(drawn)
    assert drawn != sorted(drawn)
    again = trained(corpus, length=16, tokens=300)
    np.testing.assert_array_equal(laid.sequences, again.sequences)


def test_a_cut_document_without_a_tokenizer_counts_the_bytes_of_its_ids(tmp_path, config):
    np.save(tmp_path / "a.npy", np.array([7, 8, 9, 1, 9, 10, 1], np.uint16))
    changes = dict(path=str(tmp_path / "a.npy"), tokenizer="bpe", held_out=0.0, fim_rate=0.0)
    laid = lay_out(
        prepare(dataclasses.replace(config, **changes), vocab=512),
        np.array([0, 1]),
        length=4,
        tokens=2,
    )
    assert targets(laid) == [7, 8] and laid.bytes == 4 and laid.documents == 1


def test_documents_held_out_are_not_trained_on(corpus_of):
    corpus = corpus_of([f"document number {number:03}" for number in range(50)])
    stream = Stream(corpus, length=64, seed=0, fim_rate=0.0)
    total = int(stream.epoch(0).stops[-1])
    trained = np.concatenate([stream.sequence(i)[:-1] for i in range(total // 64)])
    trained = "".join(chr(token - 6) for token in trained if token >= 6)
    for document in corpus.held_out:
        assert corpus.text(document).decode() not in trained


def test_without_bos_the_first_token_is_predicted_too(corpus_of, tmp_path, config):
    np.save(tmp_path / "a.npy", np.array([7, 8, 1, 9, 10, 1], np.uint16))
    config = dataclasses.replace(config, path=str(tmp_path / "a.npy"), held_out=0.0)
    corpus = prepare(config, vocab=512)
    laid = lay_out(corpus, np.array([1, 0]), length=4, tokens=100)
    assert laid.sequences[0, 0] == 1
    assert targets(laid) == [9, 10, 1, 7, 8, 1]
    assert laid.bytes == 4


def test_nothing_held_out(corpus_of):
    with pytest.raises(ConfigError, match=r"data\.held_out=0 "):
        held_out(corpus_of(some_texts(4), held_out=0.0), length=8, tokens=100)


@pytest.mark.parametrize("special", [True, False])
def test_marks_that_a_text_spells_out_are_text(special, tmp_path):
    """Neither do they split a document, nor become the token, however that is flagged."""
    made = tokenizers.make("byte", vocab=512, texts=())._core.to_str()
    made = json.loads(made.replace(tokenizers.EOS, "<|endoftext|>"))
    for token in made["added_tokens"]:
        token["special"] = special
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    words = tokenizers.read(tmp_path / "tokenizer.json")
    text = f"one<|endoftext|>two{tokenizers.BOS}"
    (tmp_path / "text.txt").write_text(text)
    source = open_source(str(tmp_path / "text.txt"), "text", print, whole=True)
    laid = of_text(source, words, length=16, tokens=10**6)
    assert (laid.documents, laid.bytes) == (1, len(text.encode()))
    assert targets(laid) == [*(6 + byte for byte in text.encode()), 1]


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 10, 15, 16, 17, 2**62])
def test_as_many_targets_as_asked_for(tokens, tmp_path):
    """BOS, EOS and the bytes of two documents; a character that is cut counts whole."""
    rows = [json.dumps({"text": text}) for text in ("añ cdé", "", "seven !")]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    words = tokenizers.make("byte", vocab=512, texts=())
    source = open_source(str(tmp_path / "rows.jsonl"), "text", print)
    laid = of_text(source, words, length=2**40, tokens=tokens)
    first, second = (text.encode() for text in ("añ cdé", "seven !"))
    stream = [*(6 + byte for byte in first), 1, 0, *(6 + byte for byte in second), 1]
    assert targets(laid) == stream[:tokens]
    assert laid.sequences.shape[1] == min(tokens, len(stream)) + 1
    whole = {1: 1, 2: 3, 7: 8}.get(tokens, min(len(first), tokens))
    assert laid.bytes == whole + min(max(tokens - len(first) - 2, 0), len(second))


def test_documents_without_text_are_refused(corpus_of, tmp_path):
    """Bits per byte would divide by zero: ids that decode to nothing, or no text at all."""
    corpus = corpus_of(some_texts(30))
    silent = dataclasses.replace(corpus, text=lambda document: b"")
    with pytest.raises(ConfigError, match=r"hold no text; set data\.path"):
        held_out(silent, length=8, tokens=100)
    words = tokenizers.make("byte", vocab=512, texts=())
    for texts in ([], [""]):
        with pytest.raises(ConfigError, match=r"hold no text; set data\.path"):
            of_text(texts, words, length=8, tokens=100)


@pytest.mark.parametrize("shape", [(-1,), (5, -1)])
@pytest.mark.parametrize("ids", [np.uint64(2**32 + 5), np.int64(-(2**32) + 5), np.uint32(600)])
def test_ids_are_checked_before_they_are_narrowed(tmp_path, ids, shape):
    np.save(tmp_path / "a.npy", np.full(20, ids).reshape(shape))
    with pytest.raises(ConfigError, match=rf"a\.npy holds ids from {ids} to {ids}; the model's go"):
        of_tokens([tmp_path / "a.npy"], vocab=512, length=8, tokens=100)


def test_a_damaged_table_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.full((5, 4), 7))
    data = (tmp_path / "a.npy").read_bytes()
    for damage in (data[:-8], data[:50], data.replace(b"'descr'", b"'descr(")):
        (tmp_path / "a.npy").write_bytes(damage)
        with pytest.raises(ConfigError, match=r"a\.npy is a damaged NumPy array"):
            of_tokens([tmp_path / "a.npy"], vocab=512, length=8, tokens=100)
