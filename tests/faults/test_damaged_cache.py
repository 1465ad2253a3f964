"""A cache of tokens that is damaged, left half made, full or shared: never trained on as it is."""

import dataclasses
import errno
import fcntl
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from small_texts import VOCAB, some_texts, write_jsonl

from deepseek_jax.config import ConfigError, DataConfig
from deepseek_jax.data import cache, hashing
from deepseek_jax.data.corpus import prepare
from deepseek_jax.data.loader import TrainData
from deepseek_jax.errors import RunError

KINDS = ("text", "tokens")


@pytest.fixture(params=KINDS)
def config(request, tmp_path):
    """Config of text, then of token files."""
    if request.param == "text":
        path = write_jsonl(tmp_path / "a.jsonl", some_texts(40))
    else:
        path = str(tmp_path / "a.npy")
        np.save(path, np.tile(np.array([7, 8, 9, 1, 11, 12, 1], np.uint16), 900))
    return DataConfig(
        path=path,
        tokenizer="byte",
        text_key="text",
        cache=str(tmp_path / "cache"),
        fim_rate=0.0,
        held_out=0.1,
    )


def entry_of(config) -> Path:
    (found,) = Path(config.cache).iterdir()
    return found


def opened(config):
    """Corpus, and the lines that were said."""
    said: list[str] = []
    return prepare(config, vocab=VOCAB, say=said.append), said


def contents(corpus) -> list[list[int]]:
    return [corpus.body(i).tolist() for i in range(len(corpus.spans))]


def spans_moved(file: Path, place: tuple[int, int], by: int) -> None:
    table = np.load(file)
    table[place] += by
    np.save(file, table)


def test_an_entry_under_another_name_is_built_again(config, tmp_path):
    right = contents(opened(config)[0])
    mine = entry_of(config)
    other = dataclasses.replace(config, cache=str(tmp_path / "other"), path=str(tmp_path / "b.npy"))
    np.save(other.path, np.tile(np.array([7, 8, 9, 10, 1, 12, 1], np.uint16), 900))
    opened(other)
    entry_of(other).rename(mine.with_name("other"))
    mine.rename(tmp_path / "mine")
    mine.with_name("other").rename(mine)
    corpus, said = opened(config)
    assert contents(corpus) == right
    assert any(
        "is damaged (meta.json is not what was written); building it again" in s for s in said
    )


DAMAGES = {
    "a bit of the tokens": ("tokens.bin", lambda f: flip(f, 0.5)),
    "the last bit of the tokens": ("tokens.bin", lambda f: flip(f, 0.9999)),
    "a kilobyte of the tokens": (
        "tokens.bin", lambda f: f.write_bytes(f.read_bytes()[:-1024] + bytes(1024)),
    ),
    "an id above the vocabulary": (
        "tokens.bin", lambda f: f.write_bytes(b"\0\x80" + f.read_bytes()[2:]),
    ),
    "shorter tokens": ("tokens.bin", lambda f: f.write_bytes(f.read_bytes()[:-2])),
    "longer tokens": ("tokens.bin", lambda f: f.write_bytes(f.read_bytes() + b"\7\0")),
    "a start too late": ("documents.npy", lambda f: spans_moved(f, (3, 0), 1)),
    "a start too early": ("documents.npy", lambda f: spans_moved(f, (3, 0), -40)),
    "a stop too late": ("documents.npy", lambda f: spans_moved(f, (3, 1), 40)),
    "a stop far outside": ("documents.npy", lambda f: spans_moved(f, (3, 1), 1 << 40)),
    "another hash of a document": ("documents.npy", lambda f: spans_moved(f, (0, 2), 1)),
    "a row outside the source": ("documents.npy", lambda f: spans_moved(f, (-1, -1), 1 << 40)),
    "a bit of the array's header": ("documents.npy", lambda f: flip(f, 0.02)),
    "a bit of the facts": ("meta.json", lambda f: flip(f, 0.3)),
    "other facts": (
        "meta.json",
        lambda f: f.write_text(f.read_text().replace('"largest": ', '"largest": 1')),
    ),
    "nested facts": ("meta.json", lambda f: f.write_text("[" * 100_000)),
    "facts of another kind": ("meta.json", lambda f: f.write_text("[]")),
    "a folder in place of a file": ("meta.json", lambda f: (f.unlink(), f.mkdir())),
    "a pipe in place of a file": ("meta.json", lambda f: (f.unlink(), os.mkfifo(f))),
    "a link in place of a file": (
        "documents.npy", lambda f: (f.rename(f.parent / "x"), f.symlink_to("x")),
    ),
    "a bit of the tokenizer": ("tokenizer.json", lambda f: flip(f, 0.5)),
}  # fmt: skip


def flip(file: Path, at: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 0x04
    file.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_said_and_repaired(config, damage):
    name, break_it = DAMAGES[damage]
    before, _ = opened(config)
    bodies = contents(before)
    entry = entry_of(config)
    if not (entry / name).exists():
        pytest.skip("token files have no such file in the cache")
    break_it(entry / name)
    after, said = opened(config)
    assert contents(after) == bodies
    assert (after.digest, after.facts) == (before.digest, before.facts)
    [line] = [line for line in said if "is damaged" in line]
    assert line.startswith(f"data: {entry} is damaged (") and line.endswith("building it again")
    assert entry_of(config) == entry
    assert not any("is damaged" in line for line in opened(config)[1])


@pytest.mark.parametrize(
    ("column", "row", "value", "words"),
    [
        (0, 0, -1, "spans outside"),
        (1, 3, 1 << 40, "spans outside"),
        (1, 3, 0, "spans outside"),
        (3, 0, -1, "rows outside"),
        (3, -1, 40, "rows outside"),
        (3, 2, 1, "rows outside"),
    ],
)
@pytest.mark.parametrize("config", ["text"], indirect=True)
def test_spans_are_checked_besides_their_hash(config, column, row, value, words):
    """As if whoever wrote the entry had been wrong."""
    opened(config)
    entry = entry_of(config)
    table = np.load(entry / "documents.npy")
    table[row, column] = value
    np.save(entry / "documents.npy", table)
    meta = json.loads((entry / "meta.json").read_text())
    meta["files"]["documents.npy"] = cache._written(entry / "documents.npy")
    meta["hash"] = cache._hash_of(entry.name, meta["facts"], meta["files"])
    (entry / "meta.json").write_text(json.dumps(meta))
    said = opened(config)[1]
    assert any(words in line for line in said)


def test_an_entry_that_may_not_be_removed_is_named(config, monkeypatch):
    opened(config)
    entry = entry_of(config)
    flip(entry / "documents.npy", 0.5)
    monkeypatch.setattr(cache, "_set_aside", lambda root, folder: False)
    with pytest.raises(ConfigError, match=rf"data\.cache: {entry} is damaged .*; delete it"):
        opened(config)


def test_an_entry_that_is_damaged_at_once_is_named(config, monkeypatch):
    """A failing disk: each new entry is damaged as well."""
    real = hashing.of_file
    monkeypatch.setattr(cache, "_written", lambda file: "0" * 32)
    with pytest.raises(ConfigError, match=r"data\.cache: .* is damaged .*; delete it"):
        opened(config)
    monkeypatch.setattr(hashing, "of_file", real)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["numpy.save", "os.rename", "tempfile.mkdtemp"])
def test_a_cache_that_cannot_be_written_is_named(config, monkeypatch, code, call):
    def fails(*arguments, **more):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(call, fails)
        with pytest.raises(ConfigError) as caught:
            opened(config)
    assert str(caught.value) == (
        f"the cache folder {config.cache} cannot be written ({os.strerror(code)}); set data.cache "
        "to a writable folder with room for the tokens"
    )
    assert not list(Path(config.cache).iterdir())


def test_links_that_others_planted_are_not_followed(config, tmp_path):
    opened(config)
    entry = entry_of(config)
    elsewhere = tmp_path / "elsewhere"
    entry.rename(elsewhere)
    before = {file.name: file.read_bytes() for file in elsewhere.iterdir()}
    entry.symlink_to(elsewhere)
    assert any("it is not a folder" in line for line in opened(config)[1])
    assert not entry.is_symlink()
    assert {file.name: file.read_bytes() for file in elsewhere.iterdir()} == before


def leftover(root: Path, name: str, *, lock: bytes | None, age: float) -> Path:
    folder = root / f".{name * 32}-abcdefgh"
    folder.mkdir(parents=True)
    (folder / "tokens.bin").write_bytes(b"half")
    if lock is not None:
        (folder / ".lock").write_bytes(lock)
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - age,) * 2)
    return folder


def test_leftovers_of_the_dead_are_removed(config, tmp_path):
    """Those of this machine without a lock at once; others after a day without a change."""
    root, here, there = Path(config.cache), cache._machine(), b"another machine"
    day = 25 * 3600
    dead = [
        leftover(root, "1", lock=here, age=0),
        leftover(root, "2", lock=there, age=day),
        leftover(root, "3", lock=None, age=day),
    ]
    living = [
        leftover(root, "4", lock=here, age=day),  # locked below
        leftover(root, "5", lock=there, age=0),
        leftover(root, "6", lock=None, age=0),
    ]
    (root / f".{'7' * 32}-linked").symlink_to(living[1])
    (root / ".something").mkdir()
    with (living[0] / ".lock").open("rb+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        opened(config)
    assert not any(folder.exists() for folder in dead)
    assert all((folder / "tokens.bin").exists() for folder in living)
    assert (root / ".something").exists()


def test_an_entry_in_the_making_is_locked(config, monkeypatch):
    seen = []
    real = cache._written

    def look(file):
        scratch = file.parent
        seen.append((scratch / ".lock").read_bytes() == cache._machine())
        seen.append(not cache._is_dead(scratch))
        return real(file)

    monkeypatch.setattr(cache, "_written", look)
    opened(config)
    assert seen and all(seen)
    assert not (entry_of(config) / ".lock").exists()


def train_data(config, **changes):
    return TrainData(
        dataclasses.replace(config, **changes), vocab=VOCAB, length=16, micro_sequences=4, seed=0
    )


@pytest.mark.parametrize("config", ["tokens"], indirect=True)
@pytest.mark.parametrize("place", [5, 5_000])
def test_changed_tokens_are_noticed_though_size_and_time_are_kept(config, place):
    data = train_data(config)
    state = data.state()
    data.close()
    ids, stat = np.load(config.path), os.stat(config.path)
    ids[place] = 10
    np.save(config.path, ids)
    os.utime(config.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = train_data(config)
    with pytest.raises(ConfigError, match=r"data\.path.* changed since the checkpoint"):
        changed.restore(state)
    changed.close()
    ids[place] = 60_000
    np.save(config.path, ids)
    os.utime(config.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ConfigError, match=r"model\.vocab=512 .*at least 60001"):
        train_data(config)


@pytest.mark.parametrize("config", ["text"], indirect=True)
def test_a_changed_last_document_is_noticed(config, monkeypatch):
    texts = [*["word " * 400] * 200, "the last one"]  # beyond the first 65,536 tokens
    write_jsonl(Path(config.path), texts)
    data = train_data(config, held_out=0.0)
    state = data.state()
    data.close()
    write_jsonl(Path(config.path), [*texts[:-1], "the LAST one"])
    changed = train_data(config, held_out=0.0)
    assert changed.corpus.older_digest == data.corpus.older_digest
    with pytest.raises(ConfigError, match=r"data\.path.* changed since the checkpoint"):
        changed.restore(state)
    changed.close()


@pytest.mark.parametrize("config", ["tokens"], indirect=True)
def test_a_file_that_is_cut_while_it_is_mapped_is_an_error(config):
    """Reading past the end of a mapped file would kill the process."""
    data = train_data(config)
    os.truncate(config.path, 4096)
    with pytest.raises(RunError, match=r"a\.npy became shorter while it was in use; put it back"):
        data.corpus.body(int(data.corpus.training[-1]))
    with pytest.raises(RunError, match="became shorter"):
        for _ in range(100):
            next(data)
    data.close()


@pytest.mark.parametrize("config", ["text"], indirect=True)
@pytest.mark.parametrize("change", [os.unlink, lambda path: os.truncate(path, 0)])
def test_text_that_goes_away_after_the_start_is_an_error(config, change):
    corpus, _ = opened(config)
    change(config.path)
    with pytest.raises(RunError, match=r"the text went away after the start: data\.path: .*a\.jso"):
        corpus.text(0)
    assert len(corpus.body(0))


def test_a_hash_does_not_depend_on_threads(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(os.urandom(1000))
    found = []
    for threads in (1, 7):
        monkeypatch.setattr(hashing, "_BLOCK", 64)
        monkeypatch.setattr(hashing, "_cores", lambda n=threads: n)
        with (tmp_path / "a").open("rb") as stream:
            found.append(hashing.of_file(stream.fileno()))
            found.append(hashing.of_file(stream.fileno(), 1))
    assert found[:2] == found[2:] and found[0] != found[1]
