"""Micro-batches: the stream in order, split over processes, resumed exactly."""

import dataclasses
import json

import numpy as np
import pytest
from small_texts import VOCAB, some_texts, write_jsonl

from deepseek_jax.config import ConfigError
from deepseek_jax.data.corpus import prepare
from deepseek_jax.data.loader import TrainData
from deepseek_jax.data.packing import Stream


@pytest.fixture
def train_data(config, tmp_path):
    """Makes TrainData over the same thirty texts, and closes it."""
    path = write_jsonl(tmp_path / "texts.jsonl", some_texts(30))
    made = []

    def make(changes=None, **arguments):
        arguments = {"length": 32, "micro_sequences": 8, "seed": 5} | arguments
        data_config = dataclasses.replace(config, **{"path": path, **(changes or {})})
        made.append(TrainData(data_config, vocab=VOCAB, **arguments))
        return made[-1]

    yield make
    for data in made:
        data.close()


def take(data, batches):
    return [next(data) for _ in range(batches)]


def test_batches_are_the_stream(train_data):
    data = train_data()
    stream = Stream(data.corpus, length=32, seed=5, fim_rate=0.5)
    for micro, batch in enumerate(take(data, 40)):
        assert batch.shape == (8, 33) and batch.dtype == np.int32
        want = [stream.shuffled(micro * 8 + row) for row in range(8)]
        np.testing.assert_array_equal(batch, want)
    tokens_seen = 40 * 8 * 32
    assert tokens_seen > 3 * data.facts.tokens / 2  # well into the second epoch


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_processes_share_each_micro_batch(train_data, count):
    whole = take(train_data(), 6)
    parts = [take(train_data(process_index=p, process_count=count), 6) for p in range(count)]
    assert parts[0][0].shape == (8 // count, 33)
    for micro, batch in enumerate(whole):
        rows = np.concatenate([part[micro] for part in parts])
        np.testing.assert_array_equal(rows, batch)


@pytest.mark.parametrize("at", [0, 1, 7, 30])
@pytest.mark.parametrize("count", [1, 4])
def test_resuming_is_exact(train_data, at, count):
    """From any batch, over a JSON file, onto another number of processes, in a used iterator."""
    whole = take(train_data(), at + 10)
    first = train_data()
    take(first, at)
    state = json.loads(json.dumps(first.state()))
    assert len(json.dumps(state)) < 500
    rest = []
    for process in range(count):
        again = train_data(process_index=process, process_count=count)
        take(again, 3)
        again.restore(state)
        assert again.state() == state
        rest.append(take(again, 10))
    for micro in range(10):
        rows = np.concatenate([part[micro] for part in rest])
        np.testing.assert_array_equal(rows, whole[at + micro])


def test_every_process_has_the_same_state(train_data):
    parts = [train_data(process_index=p, process_count=4) for p in (0, 3)]
    alone = train_data()
    for data in (*parts, alone):
        take(data, 5)
    assert parts[0].state() == parts[1].state() == alone.state()


def test_resuming_with_another_micro_batch_goes_on_in_the_stream(train_data):
    first = train_data()
    whole = np.concatenate(take(first, 6))
    other = train_data(micro_sequences=4)
    take(other, 3)
    first.restore(other.state())
    np.testing.assert_array_equal(np.concatenate(take(first, 4)), whole[12:44])


@pytest.mark.parametrize(
    ("changes", "arguments", "key"),
    [
        ({}, {"seed": 6}, r"seed changed.*was 5 and is 6"),
        ({}, {"length": 33}, r"batch\.length changed.*was 32 and is 33"),
        ({"fim_rate": 0.4}, {}, r"data\.fim_rate changed.*was 0\.5 and is 0\.4"),
        ({"held_out": 0.2}, {}, r"data\.path, data\.tokenizer or data\.held_out changed"),
        ({"tokenizer": "bpe"}, {}, r"data\.path, data\.tokenizer or data\.held_out changed"),
    ],
)
def test_state_of_another_stream_is_refused(train_data, changes, arguments, key):
    state = train_data().state()
    with pytest.raises(ConfigError, match=key):
        train_data(changes, **arguments).restore(state)


def test_processes_must_divide_the_micro_batch(train_data):
    with pytest.raises(ConfigError, match=r"batch\.micro_sequences=8 .*3 processes"):
        train_data(process_count=3)


def test_a_corpus_can_be_shared_and_is_described(train_data):
    first = train_data()
    second = train_data(corpus=first.corpus, seed=6)
    assert second.corpus is first.corpus
    assert first.facts.documents == 30
    assert not np.array_equal(next(first), next(second))


def older_state(data, consumed):
    """State as runs kept it before they hashed all tokens."""
    digest = data.corpus.older_digest
    return {"consumed": consumed, "digest": digest, "seed": 5, "length": 32, "fim_rate": 0.5}


def test_the_digest_of_older_runs_is_what_it_was(train_data):
    """As version 0.1.0 wrote it for these texts."""
    assert older_state(train_data(), 0)["digest"] == "c447a47d6f39b27d71eb5405e32b7908"


def test_an_older_state_is_resumed(train_data):
    whole = take(train_data(), 12)
    data = train_data()
    data.restore(older_state(data, 5 * 8))
    np.testing.assert_array_equal(take(data, 7), whole[5:])
    state = data.state()
    again = train_data()
    again.restore(state)
    assert again.state() == state == {**train_data().state(), "consumed": 12 * 8}
    with pytest.raises(ConfigError, match=r"data\.path, data\.tokenizer or data\.held_out changed"):
        data.restore(older_state(data, 0) | {"digest": "0"})


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_an_older_run_keeps_its_split_of_equal_documents(train_data, config, tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "twins.jsonl", some_texts(30) * 2)
    changes = dict(path=path, tokenizer=tokenizer)
    older = prepare(dataclasses.replace(config, **changes), vocab=VOCAB, rule=1)
    stream = Stream(older, length=32, seed=5, fim_rate=0.5)
    data = train_data(changes)
    assert not np.array_equal(data.corpus.held_out, older.held_out)
    state = {"consumed": 16, "digest": older.older_digest, "seed": 5, "length": 32, "fim_rate": 0.5}
    data.restore(state)
    np.testing.assert_array_equal(next(data), [stream.shuffled(16 + row) for row in range(8)])
    np.testing.assert_array_equal(data.corpus.held_out, older.held_out)
    again = train_data(changes)
    again.restore(data.state())
    np.testing.assert_array_equal(next(again), [stream.shuffled(24 + row) for row in range(8)])


def test_another_default_corpus_is_told(train_data, tmp_path, monkeypatch):
    data = train_data()
    state = data.state() | {"digest": "0"}
    monkeypatch.setattr(data, "_named", False)
    with pytest.raises(ConfigError, match=r"the source of Python 3\.1.*; go on under the Python"):
        data.restore(state)
