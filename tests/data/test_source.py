"""Sources: documents of every format, and errors that name their cause."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_texts import some_texts, write_jsonl

from deepseek_jax.config import ConfigError
from deepseek_jax.data.source import TEXT_MARK, open_source, token_files


def documents(path, text_key="text", say=lambda text: None) -> list[str]:
    source = open_source(str(path), text_key, say)
    return [source[i] for i in range(len(source))]


def test_standard_library_is_the_default():
    source = open_source("", "text", lambda text: None)
    assert len(source) > 200
    texts = [source[i] for i in range(0, len(source), 20)]
    assert sum("import" in text for text in texts) > len(texts) / 2


def test_rows_of_jsonl(tmp_path):
    texts = [*some_texts(20), "", "line\nbreak \u2028 and \x00 byte"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("\n", "\n\n"))
    assert documents(path) == texts


def test_rows_of_parquet_over_row_groups(tmp_path):
    texts = some_texts(25)
    table = pa.table({"n": range(26), "body": pa.array([*texts, None])})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    assert documents(tmp_path / "a.parquet", "body") == [*texts, ""]


@pytest.mark.parametrize("end", ["\n\n", "\n", " ", "é"], ids=["blank", "line", "word", "none"])
@pytest.mark.parametrize("size", [10, 3_000, 300_000])
def test_pieces_of_a_text_file_are_the_file(tmp_path, end, size):
    text = f"somewordsé{end}" * (size // 10)
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = documents(tmp_path / "a.txt")
    assert "".join(pieces) == text
    assert all(pieces)
    assert max(map(len, pieces)) <= 4 * 4096 + 4
    if size >= 3_000:
        assert len(pieces) >= 16
        assert end == "é" or all(piece.endswith(end) for piece in pieces)


def test_marks_divide_a_text_file(tmp_path):
    (tmp_path / "stories.txt").write_bytes(TEXT_MARK.join([b"one\n", b"\ntwo", b"\n", b"three"]))
    assert documents(tmp_path / "stories.txt") == ["one\n", "\ntwo", "three"]


def test_folder_of_source(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.py").write_text("import é\r\n")
    (tmp_path / "a.md").write_text("# one")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "weights.bin").write_bytes(b"\1\0")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.py").write_text("no")
    said = []
    assert documents(tmp_path, say=said.append) == ["# one", "import é\r\n"]
    assert len(said) == 1 and "skipped 3 files" in said[0]
    assert token_files(str(tmp_path)) == []


def test_folder_of_rows_and_large_texts(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    pq.write_table(pa.table({"text": ["three"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("a paragraph\n\n" * 100_000)
    texts = documents(tmp_path)
    assert texts[:3] == ["one", "two", "three"]
    assert len(texts) > 100


def test_case_of_a_suffix_does_not_matter(tmp_path):
    write_jsonl(tmp_path / "A.JSONL", ["one", "two"])
    assert documents(tmp_path / "A.JSONL") == ["one", "two"]


def test_folder_of_one_file_is_that_file(tmp_path):
    (tmp_path / "book.txt").write_text("a paragraph\n\n" * 1000)
    assert documents(tmp_path) == documents(tmp_path / "book.txt")


def test_digest_follows_content_and_not_place(tmp_path):
    first = open_source(write_jsonl(tmp_path / "a.jsonl", ["one", "two"]), "text", print).digest
    same = open_source(write_jsonl(tmp_path / "b.jsonl", ["one", "two"]), "text", print).digest
    other = open_source(write_jsonl(tmp_path / "c.jsonl", ["one", "tow"]), "text", print).digest
    assert first == same != other


def rows(tmp_path, *lines: bytes):
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path / "rows.jsonl"


GOOD = b'{"text": "good"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"content": "x"}', r"line 3 .*data\.text_key='text'.*'content'"),
        (b"[1]", r"line 3 .*data\.text_key='text'.*no keys"),
        (b'{"text": ', r"line 3 is not JSON.*data\.path"),
        (b'{"text": "\xe9"}', r"line 3 is not JSON.*data\.path"),
        (b'{"text": 7}', r"line 3.*data\.text_key='text' holds int"),
        (b'{"text": "\\ud800"}', r"line 3.*surrogate.*data\.path"),
    ],
)
def test_bad_rows_name_their_line(tmp_path, line, message):
    with pytest.raises(ConfigError, match=message):
        documents(rows(tmp_path, GOOD, b"", line, GOOD))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty.*data.path"),
        ("a.txt", b" \n\n", "is empty.*data.path"),
        ("a.jsonl", b"\n", "is empty.*data.path"),
        ("a.txt", b"text\0text", "binary file.*data.path"),
        ("a.gz", b"\x1f\x8b\x08\0", "data.path.*damaged gzip data"),
        ("a.txt", "naïve".encode("latin-1"), "not UTF-8 .byte 2 is 0xef.*data.path"),
        ("a.txt", "naïve".encode("utf-16"), "data.path.* is UTF-16 text.*iconv"),
        ("a.parquet", b"not parquet at all", "data.path.*is not a Parquet file"),
    ],
)
def test_files_that_are_no_text(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        documents(tmp_path / name)


def test_nothing_there(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path=.*does not exist"):
        documents(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"data\.path=.*neither a file nor a folder"):
        documents("/dev/null")
    with pytest.raises(ConfigError, match=r"data\.path=.*holds no text"):
        documents(tmp_path)
    (tmp_path / "a.png").write_bytes(b"\0")
    (tmp_path / "b.png").write_bytes(b"\0")
    with pytest.raises(ConfigError, match=r"holds no text.*binary.*data\.path"):
        documents(tmp_path)


def test_parquet_without_the_column_or_the_library(tmp_path, monkeypatch):
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"data\.text_key='text'.*body, n"):
        documents(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"row 1.*data\.text_key='n' holds int"):
        documents(tmp_path / "a.parquet", "n")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"data\.path.*deepseek_jax\[parquet\]"):
        documents(tmp_path / "a.parquet", "body")


def test_json_escapes_are_text(tmp_path):
    text = "é\ud83c\udf89".encode("utf-16", "surrogatepass").decode("utf-16")
    path = rows(tmp_path, json.dumps({"text": text}).encode())
    assert documents(path) == ["é🎉"]
