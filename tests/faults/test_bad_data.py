"""Data of every format and damage: right documents, or one line that names the file and the cure.

Nothing else: no other exception, no other documents, no waiting.
"""

import dataclasses
import os
import sys

import numpy as np
import pytest
from faults.bad_files import (
    BAD,
    BODIES,
    GOOD,
    GOOD_IDS,
    IDS,
    PACK,
    PROSE,
    TEXTS,
    bits_flipped,
    lines,
    refusal,
    small,
    texts_of,
    zeroed,
)
from small_texts import VOCAB

from deepseek_jax.config import ConfigError
from deepseek_jax.data.corpus import prepare


@pytest.fixture
def config(tmp_path):
    return small(tmp_path)


@pytest.mark.parametrize("name", GOOD)
def test_rows_are_found_by_content(config, tmp_path, name):
    (tmp_path / name).write_bytes(GOOD[name])
    assert texts_of(config, path=str(tmp_path / name)) == TEXTS


@pytest.mark.parametrize("name", GOOD_IDS)
def test_ids_are_found_by_content(config, tmp_path, name):
    (tmp_path / name).write_bytes(GOOD_IDS[name])
    corpus = prepare(
        dataclasses.replace(config, path=str(tmp_path / name), tokenizer="bpe"), vocab=VOCAB
    )
    assert [corpus.body(i).tolist() for i in range(12)] == BODIES


@pytest.mark.parametrize("end", ["", *PACK])
def test_plain_text_is_the_text(config, tmp_path, end):
    file = tmp_path / f"book.txt{end}"
    file.write_bytes(PACK.get(end, bytes)(b"\xef\xbb\xbf" + PROSE))
    assert "".join(texts_of(config, path=str(file))) == PROSE.decode()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named(config, tmp_path, name):
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    message = refusal(config, words, path=str(tmp_path / name), tokenizer="bpe")
    assert name in message or message.startswith(("model.vocab", "data.path"))


@pytest.mark.parametrize(
    ("end", "damage"),
    [(end, damage) for end in PACK for damage in ("cut", "flipped", "zeroed")][:-2],
)  # pyarrow writes Zstandard data without checksums
def test_damaged_compression_is_named(config, tmp_path, end, damage):
    content = PACK[end](lines(texts=[f"{text} {os.urandom(40).hex()}" for text in TEXTS * 40]))
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content = zeroed(content) if damage == "zeroed" else bits_flipped(content, 0.5)
    file = tmp_path / f"rows.jsonl{end}"
    file.write_bytes(content)
    assert refusal(config, "rows.jsonl.*is damaged .* data", path=str(file))


@pytest.mark.parametrize("after", ["damaged", "cut", "other"])
@pytest.mark.parametrize("end", [".gz", ".bz2", ".xz"])
def test_a_second_stream_is_read_or_named(config, tmp_path, end, after):
    first, second = (PACK[end](lines(texts=part)) for part in (TEXTS[:6], TEXTS[6:]))
    file = tmp_path / f"rows.jsonl{end}"
    file.write_bytes(first + bytes(8) + second + bytes(8))
    assert texts_of(config, path=str(file)) == TEXTS
    bad = {"damaged": bits_flipped(second, 0.01), "cut": second[:5], "other": b"no stream"}
    file.write_bytes(first + bad[after])
    assert refusal(config, "rows.jsonl.*is damaged .* data", path=str(file))


def test_rows_without_the_key_in_a_folder(config, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("part-0", "part-1"):
        (folder / name).write_bytes(lines("content"))
    assert refusal(config, r"JSON files without rows that have data\.text_key='text'.*part-0")


@pytest.mark.parametrize("at", np.linspace(0.01, 0.99, 25))
@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "rows.parquet", "a.npy"])
def test_a_flipped_bit_is_told_or_is_content(config, tmp_path, name, at):
    """Formats without checksums hold other text then, and no other exception leaves."""
    content = bits_flipped((GOOD | GOOD_IDS)[name], at)
    (tmp_path / name).write_bytes(content)
    try:
        corpus = prepare(
            dataclasses.replace(config, path=str(tmp_path / name), tokenizer="bpe"), vocab=VOCAB
        )
    except ConfigError as error:
        assert name in str(error) or "model.vocab" in str(error)
        assert len(str(error)) < 500 and "\n" not in str(error)
    else:
        assert len(corpus.spans) in range(11, 15)


def test_zstandard_names_its_extra(config, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl.zst").write_bytes(GOOD["rows.jsonl.zst"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(
        config, r"Zstandard.*deepseek_jax\[parquet\]", path=str(tmp_path / "rows.jsonl.zst")
    )


def test_half_of_a_megatron_data_set(config, tmp_path):
    (tmp_path / "a.bin").write_bytes(IDS.tobytes())
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX\0\0\1\0\0\0\0\0\0\0\x08")
    assert refusal(config, "half of a Megatron data set.*npy", path=str(tmp_path / "a.bin"))
    (tmp_path / "b").mkdir()
    (tmp_path / "a.bin").rename(tmp_path / "b" / "a.bin")
    (tmp_path / "a.idx").rename(tmp_path / "b" / "a.idx")
    assert refusal(config, "holds no text.*token files need a folder", path=str(tmp_path / "b"))
