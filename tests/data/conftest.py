"""Fixtures of a small corpus, tokenised as bytes."""

import dataclasses

import pytest
from small_texts import VOCAB, write_jsonl

from deepseek_jax.config import DataConfig
from deepseek_jax.data.corpus import prepare


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """Bytes, no path yet, a cache of its own."""
    return DataConfig(
        path="",
        tokenizer="byte",
        text_key="text",
        cache=str(tmp_path / "cache"),
        fim_rate=0.5,
        held_out=0.1,
    )


@pytest.fixture
def corpus_of(config, tmp_path):
    """Makes a corpus of some texts: `corpus_of(texts, fim_rate=0.0)`."""

    def make(texts: list[str], say=lambda line: None, **changes):
        path = write_jsonl(tmp_path / "texts.jsonl", texts)
        return prepare(dataclasses.replace(config, path=path, **changes), vocab=VOCAB, say=say)

    return make
