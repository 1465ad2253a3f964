"""Fill-in-the-middle keeps every token; packing is concatenation, in any order of requests."""

import collections
import threading

import numpy as np
import pytest
from small_texts import some_texts

from deepseek_jax.config import ConfigError
from deepseek_jax.data.packing import Stream

BOS, EOS, BEGIN, HOLE, END = 0, 1, 3, 4, 5


def by_hand(stream: Stream, epochs: int) -> list[int]:
    """The stream as plain Python lists, from the documents' texts."""
    tokens: list[int] = []
    for number in range(epochs):
        epoch = stream.epoch(number)
        for document, fim in zip(epoch.documents, epoch.fim, strict=True):
            body = [byte + 6 for byte in stream.corpus.text(document)]
            if fim:
                split = np.random.default_rng([stream.seed, number, 2, document])
                a, b = sorted(split.integers(0, len(body) + 1, 2))
                body = [BEGIN, *body[:a], HOLE, *body[b:], END, *body[a:b]]
            tokens += [BOS, *body, EOS]
    return tokens


@pytest.mark.parametrize("length", [1, 7, 64, 1000])
@pytest.mark.parametrize("fim_rate", [0.0, 0.5, 1.0])
def test_sequences_are_the_concatenated_epochs(corpus_of, length, fim_rate):
    stream = Stream(corpus_of(some_texts(25)), length=length, seed=3, fim_rate=fim_rate)
    tokens = by_hand(stream, epochs=3)
    for number in range((len(tokens) - 1) // length):
        got = stream.sequence(number)
        assert got.dtype == np.int32
        assert got.tolist() == tokens[number * length : (number + 1) * length + 1], number


def test_any_order_gives_the_same_sequences(corpus_of):
    corpus = corpus_of(some_texts(25))
    forward = Stream(corpus, length=100, seed=0, fim_rate=0.5)
    want = [forward.sequence(i).tolist() for i in range(400)]
    order = np.random.default_rng(0).permutation(400)
    jumping = Stream(corpus, length=100, seed=0, fim_rate=0.5)
    got = {i: jumping.sequence(i).tolist() for i in order}
    assert [got[i] for i in range(400)] == want


def test_threads_do_not_disturb_each_other(corpus_of):
    corpus = corpus_of(some_texts(5))
    one = Stream(corpus, length=50, seed=0, fim_rate=0.5)
    want = [one.sequence(i).tolist() for i in range(400)]
    shared, got = Stream(corpus, length=50, seed=0, fim_rate=0.5), {}

    def read(first):
        for i in range(first, 400, 4):
            got[i] = shared.sequence(i).tolist()

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(400)] == want


def documents_of(stream: Stream, epochs: int) -> list[list[int]]:
    """The stream's documents, cut at EOS."""
    total = sum(int(stream.epoch(e).stops[-1]) for e in range(epochs))
    rows = [stream.sequence(i)[:-1] for i in range(-(-total // stream.length))]
    tokens, documents = np.concatenate(rows)[:total], [[]]
    for token in tokens.tolist():
        documents[-1].append(token)
        if token == EOS:
            documents.append([])
    assert documents.pop() == []
    return documents


def test_fim_is_prefix_suffix_middle(corpus_of):
    """Marks in the report's order, and prefix + middle + suffix is the document."""
    corpus = corpus_of(some_texts(60))
    plain = collections.Counter(tuple(corpus.body(i)) for i in corpus.training)
    found: collections.Counter = collections.Counter()
    lengths = []
    for document in documents_of(Stream(corpus, length=64, seed=1, fim_rate=0.5), epochs=1):
        assert document[0] == BOS and document[-1] == EOS
        body = document[1:-1]
        if BEGIN in body:
            marks = [(i, t) for i, t in enumerate(body) if t in (BEGIN, HOLE, END)]
            (at, first), (hole, second), (end, third) = marks
            assert (at, first, second, third) == (0, BEGIN, HOLE, END)
            prefix, suffix, middle = body[1:hole], body[hole + 1 : end], body[end + 1 :]
            lengths.append([len(prefix), len(suffix), len(middle)])
            body = prefix + middle + suffix
        found[tuple(body)] += 1
    assert found == plain
    assert 15 < len(lengths) < 42  # of 54 at a half
    assert (np.sum(lengths, axis=0) > 100).all()


def test_fim_rate_is_of_documents(corpus_of):
    stream = Stream(corpus_of(some_texts(200, longest=3)), length=64, seed=0, fim_rate=0.1)
    share = np.mean([stream.epoch(e).fim.mean() for e in range(100)])  # 18,000 draws
    assert abs(share - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 18_000)


def test_every_epoch_has_every_document_in_a_new_order(corpus_of):
    corpus = corpus_of(some_texts(50))
    stream = Stream(corpus, length=64, seed=0, fim_rate=0.5)
    orders = [stream.epoch(e).documents.tolist() for e in range(4)]
    assert all(sorted(order) == corpus.training.tolist() for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(stream.epoch(e).fim) for e in range(4)}) == 4
    other = Stream(corpus, length=64, seed=1, fim_rate=0.5)
    assert other.epoch(0).documents.tolist() != orders[0]


def test_held_out_documents_never_appear(corpus_of):
    texts = [f"document number {number:03}" for number in range(100)]
    corpus = corpus_of(texts)
    stream = Stream(corpus, length=64, seed=0, fim_rate=0.0)
    seen = {bytes(t - 6 for t in d[1:-1]).decode() for d in documents_of(stream, epochs=3)}
    held = {corpus.text(i).decode() for i in corpus.held_out}
    assert len(held) == 10
    assert seen == set(texts) - held


@pytest.mark.parametrize("fim_rate", [0.0, 1.0])
def test_a_document_longer_than_many_sequences(corpus_of, fim_rate):
    texts = ["a", "long " * 5000, "é", "東京"]
    stream = Stream(corpus_of(texts, held_out=0.0), length=16, seed=0, fim_rate=fim_rate)
    tokens = by_hand(stream, epochs=2)
    got = [stream.sequence(i)[:-1] for i in range(len(tokens) // 16)]
    assert np.concatenate(got).tolist() == tokens[: len(got) * 16]


def test_a_window_is_shuffled_and_loses_nothing(corpus_of):
    corpus = corpus_of(some_texts(25))
    stream = Stream(corpus, length=16, seed=0, fim_rate=0.5)
    size = stream.window
    assert size == sum(len(stream.corpus.text(d)) + 2 for d in corpus.training) // 16
    for window in (1, 0):  # in any order
        numbers = range(window * size, (window + 1) * size)
        met = [stream.shuffled(number).tolist() for number in numbers]
        plain = [stream.sequence(number).tolist() for number in numbers]
        assert sorted(met) == sorted(plain) and met != plain
    other = Stream(corpus, length=16, seed=1, fim_rate=0.5)
    assert [other.shuffled(n).tolist() for n in range(size)] != met


def test_too_little_text(corpus_of):
    corpus = corpus_of(["abc", "def"], held_out=0.0)  # 10 tokens with BOS and EOS
    assert len(Stream(corpus, length=9, seed=0, fim_rate=0.0).sequence(5)) == 10
    with pytest.raises(ConfigError, match=r"data\.path holds 10 tokens.*batch\.length=10.*most 9"):
        Stream(corpus, length=10, seed=0, fim_rate=0.0)
    with pytest.raises(ConfigError, match="seed=-1"):
        Stream(corpus, length=9, seed=-1, fim_rate=0.0)
