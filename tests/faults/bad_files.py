"""Files of every format, good and damaged, and the words that refuse the latter."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_texts import VOCAB

from deepseek_jax.config import ConfigError, DataConfig
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
    "other_key.txt": (lines("content"), "line 1 .*data.text_key='text'.*'content'"),
    "other_key": (lines("content"), "line 1 .*data.text_key='text'.*'content'"),
    "other_key.gz": (gzip.compress(lines("content")), "line 1 .*data.text_key='text'.*'content'"),
    "late_key.txt": (b'{"version": 1}\n' + lines(), "line 1 .*data.text_key='text'.*'version'"),
    "joined.txt": (lines().replace(b"\n", b""), "is not JSON.*one JSON object per line"),
    "cut_array.txt": (array()[:-9], "is not JSON.*array of objects"),
    "strings.txt": (b'["one", "two"]', "no row.*data.text_key='text'"),
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
    "accents.bin": (PROSE + "naïve".encode(), "no bare ids.*text that begins"),
    "cyrillic.bin": ("слова и слова ".encode() * 9, "no bare ids.*text that begins"),
    "eight.bin": (IDS.astype("<i8").tobytes(), "dtype int64.*little-endian.*npy"),
    "big_endian.bin": (IDS.astype(">u4").tobytes(), "dtype big-endian uint32.*npy"),
    "float.bin": (IDS.astype("<f4").tobytes(), "dtype float32.*npy"),
    "double.bin": (IDS.astype("<f8").tobytes(), "dtype float64.*npy"),
    "zeros.bin": (bytes(800), "nothing but zeros"),
    "zeros.npy": (npy(IDS * 0), "nothing but zeros"),
    "wide.bin": ((IDS + np.uint32(70000)).astype("<u4").tobytes(), "whose ids reach 70022"),
    "odd.bin": (IDS.tobytes()[:-1], "no whole number"),
    "empty.bin": (b"", "is empty"),
    "cut_llm_c.bin": (llm_c()[:-8], "is damaged: its header"),
    "nothing_llm_c.bin": (llm_c(IDS[:0]), "is empty"),
    "beyond.bin": ((IDS + 600).tobytes(), "model.vocab=512"),
}
BAD = TEXT_CASES | ROW_CASES | PARQUET_CASES | ID_CASES


def small(tmp_path) -> DataConfig:
    """Bytes of the file `data`, nothing held out, a cache of its own."""
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
