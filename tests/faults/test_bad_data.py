"""Data of every format and damage: right documents, or one line that names the file and the cure.

Nothing else: no other exception, no other documents, no waiting.
"""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_texts import VOCAB

from deepseek_jax.config import ConfigError, DataConfig
from deepseek_jax.data import files, tokenizer
from deepseek_jax.data.corpus import prepare

TEXTS = [f"text number {number} of the rows" for number in range(12)]
IDS = np.array([i for n in range(12) for i in [*range(6, 12 + n), 1]], np.uint16)
BODIES = [list(range(6, 12 + n)) for n in range(12)]
PROSE = "\n\n".join(TEXTS).encode()


def lines(key="text", texts=TEXTS) -> bytes:
    return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts).encode()


def array(key="text") -> bytes:
    return json.dumps([{key: text} for text in TEXTS], indent=1).encode()


def parquet(key="text", column=TEXTS, **options) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({key: column}), stream, **options)
    return stream.getvalue()


def npy(ids=IDS) -> bytes:
    stream = io.BytesIO()
    np.save(stream, ids)
    return stream.getvalue()


def llm_c(ids=IDS) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    return header.tobytes() + ids.tobytes()


def zstd(data: bytes) -> bytes:
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(data)
    return stream.getvalue().to_pybytes()


def archive(kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as made:
            made.writestr("a.txt", PROSE)
    elif kind == "npz":
        np.savez(stream, a=IDS)
    else:
        with tarfile.open(fileobj=stream, mode=kind) as made:
            entry = tarfile.TarInfo("a.txt")
            entry.size = len(PROSE)
            made.addfile(entry, io.BytesIO(PROSE))
    return stream.getvalue()


def bits_flipped(data: bytes, at: float) -> bytes:
    place = int(at * len(data))
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


def zeroed(data: bytes) -> bytes:
    third = len(data) // 3
    return data[:third] + bytes(third) + data[2 * third :]


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
HTML = b"<!DOCTYPE html>\n<html><body>404 not found, sorry</body></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n"

# name -> content of a file that is read right, whatever its name
GOOD = {
    "rows.jsonl": lines(),
    "rows.ndjson": lines(),
    "rows.json": lines(),
    "rows": lines(),
    "rows.txt": lines(),
    "blank.jsonl": lines().replace(b"\n", b"\n\n \n"),
    "crlf.jsonl": lines().replace(b"\n", b"\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(),
    "bom.json": b"\xef\xbb\xbf" + array(),
    "unended.jsonl": lines()[:-1],
    "array.json": array(),
    "array.jsonl": array(),
    "array": array(),
    "array_on_one_line.json": json.dumps(json.loads(array())).encode(),
    "rows.parquet": parquet(),
    "groups.parquet": parquet(row_group_size=5),
    "packed.parquet": parquet(compression="zstd"),
    "parquet": parquet(),
    "parquet.jsonl": parquet(),
    "zipped.jsonl": gzip.compress(lines()),
    "two_members.jsonl.gz": gzip.compress(lines()[:100]) + gzip.compress(lines()[100:]),
    **{f"rows.jsonl{end}": pack(lines()) for end, pack in PACK.items()},
    **{f"rows.json{end}": pack(lines()) for end, pack in PACK.items()},
    **{f"array.json{end}": pack(array()) for end, pack in PACK.items()},
}
GOOD_IDS = {
    "a.npy": npy(),
    "four.npy": npy(IDS.astype(np.uint32)),
    "eight.npy": npy(IDS.astype(np.int64)),
    "big_endian.npy": npy(IDS.astype(">u2")),
    "array": npy(),
    "array.tokens": npy(),
    "a.bin": IDS.tobytes(),
    "four.bin": IDS.astype("<u4").tobytes(),
    "llm_c.bin": llm_c(),
}

TEXT_CASES = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n\n\t", "is empty"),
    "zeros.txt": (PROSE + b"\0", "binary file"),
    "latin.txt": ("naïve ".encode("latin-1") * 9, "not UTF-8"),
    "cut.txt": (PROSE + "é".encode()[:1], "not UTF-8"),
    "utf16.txt": (PROSE.decode().encode("utf-16"), "UTF-16 text.*iconv"),
    "utf16be.txt": (b"\xfe\xff" + PROSE.decode().encode("utf-16-be"), "UTF-16 text.*iconv"),
    "utf32.txt": (PROSE.decode().encode("utf-32"), "UTF-32 text.*iconv"),
    "lfs.txt": (LFS, "Git LFS pointer.*git lfs pull"),
    "picture.txt": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "PNG picture"),
    "page.txt": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "PDF document"),
    "program": (b"\x7fELF\2\1\1\0", "a program"),
    "pickle.txt": (b"\x80\4\x95\x10\0\0\0\0\0\0\0]", "Python pickle"),
    "model.gguf": (b"GGUF\3\0\0\0", "GGUF"),
    "base.db": (b"SQLite format 3\0\x10\0", "SQLite"),
    "table.feather": (b"ARROW1\0\0\xff\xff\xff\xff", "Arrow.*Parquet"),
    "rows.avro": (b"Obj\1\4\x16avro\0", "Avro.*Parquet"),
    "data.h5": (b"\x89HDF\r\n\x1a\n\0", "HDF5"),
    "rows.7z": (b"7z\xbc\xaf\x27\x1c\0\4", "7z"),
    "index.idx": (b"MMIDIDX\0\0\1\0\0\0", "Megatron"),
    "rows.csv": (b"id,text\n1,words\n", "table with the column 'text'.*JSONL"),
    "rows.tsv": (b'"id"\t"text"\n1\twords\n', "table with the column 'text'.*JSONL"),
    "docs.zip": (archive("zip"), "ZIP archive"),
    "docs.txt": (archive("zip"), "ZIP archive"),
    "docs.tar": (archive("w"), "tar archive"),
    "docs.tar.gz": (archive("w:gz"), "tar archive"),
    "docs.tgz": (archive("w:gz"), "tar archive"),
    "docs.tar.xz": (archive("w:xz"), "tar archive"),
    "ids.npz": (archive("npz"), "ZIP archive"),
}
ROW_CASES = {
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n \n", "is empty"),
    "empty.json": (b"", "is empty"),
    "nothing.json": (b"[]", "is empty"),
    "nothing.jsonl": (b"[]", "is empty"),
    "words.jsonl": (PROSE, "line 1 is not JSON.*text that begins"),
    "page.jsonl": (HTML, "line 1 is not JSON.*HTML page"),
    "page.json": (HTML, "is not JSON"),
    "lfs.jsonl": (LFS, "Git LFS pointer"),
    "lfs.json": (LFS, "Git LFS pointer"),
    "utf16.jsonl": (lines().decode().encode("utf-16"), "UTF-16"),
    "zip.jsonl": (archive("zip"), "ZIP archive"),
    "zeroed.jsonl": (zeroed(lines()), "is not JSON"),
    "cut.jsonl": (lines()[:-9], "line 12 is not JSON"),
    "cut.json": (array()[:-9], "is not JSON"),
    "latin.jsonl": (b'{"text": "\xe9"}', "is not JSON"),
    "joined.jsonl": (lines().replace(b"\n", b""), "is not JSON"),
    "other_key.jsonl": (lines("content"), "data.text_key='text'.*'content'"),
    "other_key.json": (lines("content"), "data.text_key='text'.*'content'"),
    "other_array.json": (array("content"), "no row.*data.text_key='text'"),
    "other_array.jsonl": (array("content"), "row 1.*data.text_key='text'.*'content'"),
    "object.json": (b'{"data": [{"text": "x"}]}', "no row.*data.text_key='text'"),
    "strings.json": (b'["one", "two"]', "no row.*data.text_key='text'"),
    "number.json": (b"7", "JSON without rows"),
    "number.jsonl": (b"7\n", "line 1.*no keys"),
    "a_number.jsonl": (lines() + b"7\n", "line 13.*no keys"),
    "null.jsonl": (b"null\n", "line 1.*no keys"),
    "number_in.jsonl": (b'{"text": 7}\n', "holds int"),
    "list_in.json": (b'[{"text": ["a"]}]', "holds list"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "surrogate"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", "line 1 is not JSON.*deeply"),
    "deep.json": (b"[" * 100_000, "is not JSON.*deeply"),
    "long_number.jsonl": (b'{"text": ' + b"9" * 5000 + b"}\n", "is not JSON"),
    "many_keys.jsonl": (
        json.dumps({"k" * 99 + str(n): 1 for n in range(99)}).encode() + b"\n",
        "data.text_key='text'",
    ),
    "nulls.jsonl": (b'{"text": null}\n' * 3, "0 documents"),
}
PARQUET_CASES = {
    "empty.parquet": (b"", "not a Parquet file.*empty"),
    "words.parquet": (PROSE, "not a Parquet file.*text that begins"),
    "page.parquet": (HTML, "not a Parquet file.*HTML"),
    "lfs.parquet": (LFS, "not a Parquet file.*Git LFS"),
    "cut.parquet": (parquet()[:-20], "not a Parquet file"),
    "headless.parquet": (b"\0" + parquet()[1:-4], "not a Parquet file"),
    "pages.parquet": (
        zeroed(parquet(column=[f"{i}" * 999 for i in range(40)], compression="gzip")),
        "row 1 cannot be read|not a Parquet file",
    ),
    "other_key.parquet": (parquet("content"), "no column data.text_key='text'.*content"),
    "numbers.parquet": (parquet(column=[1, 2, 3]), "holds int"),
    "lists.parquet": (parquet(column=[["a"]]), "holds list"),
    "bytes.parquet": (parquet(column=[b"\xff"]), "holds bytes"),
    "latin.parquet": (
        parquet(column=["caff" + "x" * 90]).replace(b"caff", b"caf\xe9"),
        "row 1 cannot be read",
    ),
    "nobody.parquet": (parquet(column=pa.array([], pa.string())), "is empty"),
}
ID_CASES = {
    "empty.npy": (b"", "is empty"),
    "empty_row.npy": (npy(IDS[:0]), "is empty"),
    "words.npy": (PROSE, "not a NumPy array.*text that begins"),
    "page.npy": (HTML, "not a NumPy array.*HTML"),
    "lfs.npy": (LFS, "not a NumPy array.*Git LFS"),
    "cut.npy": (npy()[:-2], "damaged NumPy array"),
    "header.npy": (npy()[:40], "damaged NumPy array"),
    "doubled.npy": (npy() * 2, "damaged NumPy array"),
    "unquoted.npy": (npy().replace(b"'descr'", b"'descr("), "damaged NumPy array"),
    "other_version.npy": (npy().replace(b"NUMPY\1", b"NUMPY\7"), "damaged NumPy array"),
    "huge.npy": (npy().replace(b"(150,)", b"(9**9,"), "damaged NumPy array"),
    "objects.npy": (npy(np.array([{}], object)), "object of shape"),
    "pairs.npy": (npy(np.zeros(3, [("a", "i4"), ("b", "i4")])), "of shape"),
    "floats.npy": (npy(np.zeros(9)), "float64 of shape"),
    "table.npy": (npy(IDS.reshape(2, -1)), "of shape"),
    "scalar.npy": (npy(np.array(7)), "of shape"),
    "negative.npy": (npy(IDS.astype(np.int32) - 50), "id -49"),
    "beyond.npy": (npy(IDS + 600), "model.vocab=512.*at least"),
    "beyond_64.npy": (npy(IDS.astype(np.uint64) + 2**32), "model.vocab=512"),
    "words.bin": (PROSE, "no bare ids.*text that begins"),
    "page.bin": (HTML + b" ", "no bare ids.*HTML"),
    "lfs.bin": (LFS, "no bare ids.*Git LFS"),
    "zip.bin": (archive("zip"), "no bare ids.*ZIP"),
    "gzip.bin": (gzip.compress(IDS.tobytes()), "no bare ids.*gzip"),
    "packed.npy.gz": (gzip.compress(npy()), "no bare ids.*gzip data; unpack it"),
    "pickle.bin": (b"\x80\4]" + b"K\1" * 90 + b".", "no bare ids.*pickle"),
    "parquet.bin": (parquet(), "no bare ids.*Parquet"),
    "odd.bin": (IDS.tobytes()[:-1], "no whole number"),
    "empty.bin": (b"", "is empty"),
    "cut_llm_c.bin": (llm_c()[:-8], "is damaged: its header"),
    "nothing_llm_c.bin": (llm_c(IDS[:0]), "is empty"),
    "beyond.bin": ((IDS + 600).tobytes(), "model.vocab=512"),
}
BAD = TEXT_CASES | ROW_CASES | PARQUET_CASES | ID_CASES


@pytest.fixture
def config(tmp_path):
    return DataConfig(
        path=str(tmp_path / "data"),
        tokenizer="byte",
        text_key="text",
        cache=str(tmp_path / "cache"),
        fim_rate=0.0,
        held_out=0.0,
    )


def refusal(config, words, **changes) -> str:
    """The message that refuses a config: one short line with some words."""
    with pytest.raises(ConfigError, match=words) as caught:
        prepare(dataclasses.replace(config, **changes), vocab=VOCAB)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 500
    return message


def texts_of(config, **changes) -> list[str]:
    corpus = prepare(dataclasses.replace(config, **changes), vocab=VOCAB)
    return [corpus.tokenizer.decode(corpus.body(i)) for i in range(len(corpus.spans))]


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
    refusal(config, "rows.jsonl.*is damaged .* data", path=str(file))


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
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    refusal(config, r"Zstandard.*deepseek_jax\[parquet\]", path=str(tmp_path / "rows.jsonl.zst"))


def test_half_of_a_megatron_data_set(config, tmp_path):
    (tmp_path / "a.bin").write_bytes(IDS.tobytes())
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX\0\0\1\0\0\0\0\0\0\0\x08")
    refusal(config, "half of a Megatron data set.*npy", path=str(tmp_path / "a.bin"))
    (tmp_path / "b").mkdir()
    (tmp_path / "a.bin").rename(tmp_path / "b" / "a.bin")
    (tmp_path / "a.idx").rename(tmp_path / "b" / "a.idx")
    refusal(config, "holds no text.*token files need a folder", path=str(tmp_path / "b"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "a.npy", "a.bin"])
@pytest.mark.parametrize("alone", [True, False])
def test_an_unreadable_file_is_named(config, tmp_path, monkeypatch, name, alone):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes((GOOD | GOOD_IDS | {"a.txt": PROSE}).get(name, PROSE))
    if not alone:
        (folder / f"b{name[1:]}").write_bytes((folder / name).read_bytes())
    real = os.open

    def denied(path, *rest, **more):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", denied)
    path = folder / name if alone else folder
    assert name in refusal(config, "cannot be read: Permission denied", path=str(path))


@pytest.mark.parametrize("file_system_error", [5, 116, 24], ids=["EIO", "ESTALE", "EMFILE"])
def test_a_failing_disk_is_named(config, tmp_path, monkeypatch, file_system_error):
    (tmp_path / "a.jsonl").write_bytes(lines())
    real = os.pread

    def fails(descriptor, *rest):
        raise OSError(file_system_error, os.strerror(file_system_error))

    monkeypatch.setattr(files.os, "pread", fails)
    refusal(config, os.strerror(file_system_error), path=str(tmp_path / "a.jsonl"))
    monkeypatch.setattr(files.os, "pread", real)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("x" * 5000, "no path that can be opened|does not exist"),
        ("/".join(["x" * 200] * 30), "no path that can be opened"),
        ("~nobody_of_this_name/x", "home folder that is unknown"),
        ("a\0b", "no path that can be opened"),
        ("nothing\udcff", "does not exist|neither|no path"),
        ("new\nline", "does not exist|neither|no path"),
    ],
)
@pytest.mark.parametrize("key", ["path", "tokenizer"])
def test_paths_that_cannot_be(config, tmp_path, key, value, words):
    (tmp_path / "data").write_bytes(PROSE)
    message = refusal(config, f"data.{key}=.*({words}|nor a tokenizer.json)", **{key: value})
    assert message.startswith(f"data.{key}=")


@pytest.mark.parametrize("value", ["x" * 5000, "~nobody_of_this_name/x", "a\0b", "/dev/null/x"])
def test_caches_that_cannot_be(config, tmp_path, value):
    (tmp_path / "data").write_bytes(PROSE)
    refusal(config, r"data\.cache", cache=value)


def test_a_user_without_a_home(config, tmp_path, monkeypatch):
    (tmp_path / "data").write_bytes(PROSE)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    refusal(config, r"no home folder; set data\.cache", cache="")
    for key in ("path", "tokenizer"):
        refusal(config, rf"data\.{key}='~/x' names a home folder", **{key: "~/x"})


@pytest.mark.parametrize("name", [b"\xff.txt", b"\xff.jsonl", b"\xff.npy", b"a\nb.txt"])
def test_names_that_are_no_text(config, tmp_path, name):
    """They are read; a message shows them escaped."""
    good = GOOD["rows.jsonl"] if name.endswith(b"jsonl") else npy()
    content = PROSE if name.endswith(b"txt") else good
    folder = os.fsencode(tmp_path / "folder")
    os.mkdir(folder)
    with open(os.path.join(folder, name), "wb") as stream:
        stream.write(content)
    assert texts_of(config, path=os.fsdecode(folder), tokenizer="byte")
    with open(os.path.join(folder, name), "wb") as stream:
        stream.write(b"\0\1\2")
    refusal(config, r"\\udcff|\\nb", path=os.fsdecode(os.path.join(folder, name)))


def test_pipes_sockets_and_links_in_a_folder(config, tmp_path):
    """They are left out with a line, and opening them never waits."""
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_bytes(PROSE)
    os.mkfifo(folder / "pipe.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "round").symlink_to("round")
    (folder / "deeper" / "up").symlink_to("..")
    said: list[str] = []
    corpus = prepare(dataclasses.replace(config, path=str(folder)), vocab=VOCAB, say=said.append)
    assert len(corpus.spans) == 1
    assert any("skipped 4 files" in line for line in said)
    for name in ("pipe.txt", "gone.txt", "round"):
        refusal(
            config,
            r"data\.path=.*(neither a file|does not exist|cannot be)",
            path=str(folder / name),
        )


@pytest.mark.parametrize("name", ["gone.npy", "pipe.npy"])
def test_a_missing_shard_is_not_left_out(config, tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.npy").write_bytes(npy())
    if name.startswith("gone"):
        (folder / name).symlink_to("nowhere")
    else:
        os.mkfifo(folder / name)
    assert name in refusal(config, "holds token files, and", path=str(folder))


def test_a_folder_that_cannot_be_listed(config, tmp_path, monkeypatch):
    (tmp_path / "folder" / "locked").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_bytes(PROSE)
    real = os.scandir

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", denied)
    refusal(
        config, "folder .*locked cannot be read: Permission denied", path=str(tmp_path / "folder")
    )


def test_tokens_beside_text(config, tmp_path):
    """A few words beside token files are not the corpus."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("Tokens of a model.")
    (folder / "a.npy").write_bytes(npy())
    refusal(config, "bytes of token files beside 18 bytes of text", path=str(folder))


@pytest.mark.parametrize("content", [array("content"), lines("content"), array()[:-5]])
def test_json_in_folders(config, tmp_path, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.json").write_bytes(content)
    (folder / "b.json").write_bytes(content)
    refusal(config, "data.text_key='text'", path=str(folder))


def test_json_beside_source_code_is_text(config, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.py").write_text("import b\n")
    (folder / "package.json").write_text('{\n "name": "b"\n}\n')
    said: list[str] = []
    corpus = prepare(dataclasses.replace(config, path=str(folder)), vocab=VOCAB, say=said.append)
    assert len(corpus.spans) == 2
    assert any("1 JSON files have no rows with the field 'text'" in line for line in said)


@pytest.mark.parametrize("when", ["emptied", "removed", "other"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_text_that_changes_while_it_is_read(config, tmp_path, monkeypatch, name, when):
    file = tmp_path / name
    file.write_bytes(GOOD["groups.parquet"] if name.endswith("parquet") else lines())
    real = tokenizer.make

    def make(*arguments, **more):
        if when == "removed":
            file.unlink()
        else:
            file.write_bytes(b"" if when == "emptied" else lines(texts=TEXTS[::-1]))
        return real(*arguments, **more)

    monkeypatch.setattr(tokenizer, "make", make)
    refusal(config, "changed while it was in use|No such file", path=str(file))
    assert not list((tmp_path / "cache").iterdir())


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
    refusal(config, "nor a tokenizer.json", tokenizer=str(tmp_path))
    refusal(config, "nor a tokenizer.json", tokenizer="/dev/zero")
    if os.path.exists("/proc/self/mem"):
        refusal(config, "/proc/self/mem cannot be read", tokenizer="/proc/self/mem")


def test_messages_are_short(config, tmp_path):
    (tmp_path / "data").write_bytes(lines())
    file = tmp_path / "data.jsonl"
    (tmp_path / "data").rename(file)
    message = refusal(config, "data.text_key='kkk", text_key="k" * 5000, path=str(file))
    assert "it has keys 'id', 'text'" in message
